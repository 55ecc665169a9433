-- read, at most 3 s, 3 at once
--
-- One page of the incidents whose description contains a text, in any case, or whose labels pass a filter, or both.
-- For the rest, see incident_page.sql.
--   $1 statuses           text[]
--   $2 sources            text[]
--   $3 since              timestamptz
--   $4 before_created_at  timestamptz
--   $5 before_id          bigint
--   $6 size               integer
--   $7 format             text
--   $8 separator          text
--   $9 pattern            text         for ILIKE, in the form of search_form(); null for any text
--   $10 has_accents       boolean      whether that form changes the text itself
--   $11 label_filter      jsonpath     for the operator @@; null for any labels
-- Only the part of the union that choose_search() has chosen reads rows; the third one serves 'texts' and 'labels'.
-- There, OFFSET 0 makes PostgreSQL fetch the incidents one by one, so that it stops when the page is full. Its index
-- of labels is used only where labels <> '{}' is repeated.
  WITH choice AS MATERIALIZED (
       SELECT choose_search($1, $2, $3, $4, $5, $9, $10, $11) AS way),
       page AS (
       (SELECT created_at, id, incident
          FROM incidents_between($3, $4, $5) AS incident
         WHERE (SELECT way FROM choice) = 'list' AND incident_matches(incident, $1, $2, $9, $10, $11)
         ORDER BY created_at DESC, id DESC LIMIT $6::integer + 1)
        UNION ALL
        SELECT newest.*
          FROM unnest($1) AS wanted_status (status) CROSS JOIN unnest($2) AS wanted_source (source) CROSS JOIN LATERAL (
               SELECT created_at, id, incident
                 FROM incidents_between($3, $4, $5) AS incident
                WHERE (SELECT way FROM choice) = 'chosen' AND incident_matches(incident, NULL, NULL, $9, $10, $11)
                  AND status = wanted_status.status AND source = wanted_source.source
                ORDER BY created_at DESC, id DESC LIMIT $6 + 1) AS newest
        UNION ALL
       (SELECT hit.created_at, hit.id, incident
          FROM (SELECT created_at, id FROM incident_texts_between($3, $4, $5)
                 WHERE (SELECT way FROM choice) = 'texts' AND description ILIKE $9
                 UNION ALL
                SELECT created_at, id FROM incident_texts_between($3, $4, $5)
                 WHERE (SELECT way FROM choice) = 'labels' AND labels @@ $11 AND labels <> '{}'
                 ORDER BY created_at DESC, id DESC) AS hit
               CROSS JOIN LATERAL (SELECT incident FROM incidents AS incident WHERE incident.id = hit.id OFFSET 0) AS found
         WHERE incident_matches(incident, $1, $2, $9, $10, $11)
         ORDER BY hit.created_at DESC, hit.id DESC LIMIT $6 + 1)
        ORDER BY created_at DESC, id DESC LIMIT $6 + 1),
       arrays AS (
       SELECT array_agg(id) AS ids, array_agg(created_at) AS times, array_agg(incident_line(incident, $7)) AS lines FROM page)
SELECT convert_to(coalesce(array_to_string(lines[:$6], $8), ''), 'UTF8') AS body,
       coalesce(cardinality(ids) > $6, false) AS has_more, ROW(times[$6], ids[$6]) AS position
  FROM arrays;
