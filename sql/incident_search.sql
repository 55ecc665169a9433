-- read, at most 5 s, 6 at once
--
-- One page of the incidents that pass every filter that is given: a text in the description
-- (case-insensitively), labels, and a dedup_key that points to them. It returns what
-- incident_page.sql does.
--   $1 statuses           text[]       null for no filter, and then $2 must be null too
--   $2 sources            text[]       null for no filter, and then $1 must be null too
--   $3 since              timestamptz  created at this time or later, null for no bound
--   $4 before_created_at  timestamptz  before this place in the list, null for its beginning
--   $5 before_id          bigint       the id at that place
--   $6 size               integer      incidents at most
--   $7 format             text         json, ndjson or csv
--   $8 pattern            text         for ILIKE, in Unicode's NFC; null for any text
--   $9 has_accents        boolean      whether a letter in it may also be two characters: é
--   $10 label_filter      jsonpath     for the operator @@; null for any labels
--   $11 dedup_key         text         of any actor; null for no such filter
-- choice picks one branch of the union; the others read nothing. It is 'keys' when $11 is given,
-- and otherwise what choose_search() in 0002.functions.sql returns.
  WITH choice AS MATERIALIZED (
       SELECT CASE WHEN $11::text IS NOT NULL THEN 'keys'
                   ELSE choose_search(
                        statuses => $1, sources => $2, since => $3, before_created_at => $4,
                        before_id => $5, pattern => $8, has_accents => $9, label_filter => $10)
                   END AS way),

       page AS (
       -- Many pass the filters: walk along the list.
       (SELECT created_at, id, incident
          FROM incidents_between($3, $4, $5) AS incident
         WHERE (SELECT way FROM choice) = 'list'
           AND incident_matches(incident, $1, $2, $8, $9, $10)
         ORDER BY created_at DESC, id DESC
         LIMIT $6::integer + 1)

        UNION ALL

       -- Few have the status and the source, but many of those pass the other filters.
        SELECT newest.created_at, newest.id, newest.incident
          FROM unnest($1) AS wanted_status (status)
               CROSS JOIN unnest($2) AS wanted_source (source)
               CROSS JOIN LATERAL (
               SELECT created_at, id, incident
                 FROM incidents_of(wanted_status.status, wanted_source.source, $3, $4, $5)
                      AS incident
                WHERE (SELECT way FROM choice) = 'by_status'
                  AND incident_matches(incident, NULL, NULL, $8, $9, $10)
                ORDER BY status DESC, source DESC, created_at DESC, id DESC
                LIMIT $6 + 1) AS newest

        UNION ALL

       -- Few have the text, the labels or the dedup_key: indexes find them. incident_texts has a
       -- copy of every description and labels, which triggers keep up to date. The index of labels
       -- is used only where its own condition, labels <> '{}', is repeated. A dedup_key points to
       -- one incident of each actor that uses it. With OFFSET 0, PostgreSQL fetches the incidents
       -- one by one, and stops when the page is full.
       (SELECT hit.created_at, hit.id, incident
          FROM (SELECT created_at, id
                  FROM incident_texts
                 WHERE (SELECT way FROM choice) = 'texts' AND description ILIKE $8
                 UNION ALL
                SELECT created_at, id
                  FROM incident_texts
                 WHERE (SELECT way FROM choice) = 'labels' AND labels @@ $10 AND labels <> '{}'
                 UNION ALL
                SELECT created_at, id
                  FROM dedup_keys
                       JOIN incident_texts ON id = incident_id
                 WHERE (SELECT way FROM choice) = 'keys' AND key = $11
                 ORDER BY created_at DESC, id DESC) AS hit
               CROSS JOIN LATERAL (
               SELECT incident
                 FROM incidents AS incident
                WHERE incident.id = hit.id
               OFFSET 0) AS found
         WHERE hit.created_at >= coalesce($3, '-infinity')
           AND (hit.created_at, hit.id) < (coalesce($4, 'infinity'), coalesce($5, 0))
           AND incident_matches(incident, $1, $2, $8, $9, $10)
         ORDER BY hit.created_at DESC, hit.id DESC
         LIMIT $6 + 1)

        ORDER BY created_at DESC, id DESC
        LIMIT $6 + 1),

       arrays AS (
       SELECT array_agg(id) AS ids, array_agg(created_at) AS creation_times,
              array_agg(incident_line(incident, $7)) AS lines
         FROM page)

SELECT join_lines(lines[:$6], $7) AS body,
       coalesce(cardinality(ids) > $6, false) AS has_more,
       ROW(creation_times[$6], ids[$6]) AS position
  FROM arrays;
