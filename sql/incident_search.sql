-- kind: read, search
--
-- One page of the incidents whose description contains a text, in any case. For the rest, see incident_page.sql.
--   $1 statuses           text[]
--   $2 sources            text[]
--   $3 since              timestamptz
--   $4 before_created_at  timestamptz
--   $5 before_id          bigint
--   $6 size               integer
--   $7 format             text
--   $8 separator          text
--   $9 pattern            text         for ILIKE, in the form of search_form()
--   $10 has_accents       boolean      whether that form changes the text itself
-- The newest 1,000 between the bounds choose one of three ways. has_chosen_hits: 10 contain the text and pass
-- the filter, or there are fewer than 1,000: walk along the list. Only has_hits: walk along each chosen status
-- and source. Neither: ask the trigram index; OFFSET 0 lets it stop when the page is full. In a short text
-- ('%ab%', but not '%a b%') there is no trigram: the index would read all of itself, and a cancel has to wait meanwhile.
  WITH shortness AS (SELECT $9 !~ '[[:alnum:]]{3}|[^[:alnum:]%_\\][[:alnum:]]' AS is_short),
       sample AS MATERIALIZED (
       SELECT count(*) < 1000 OR count(*) FILTER (WHERE is_hit AND is_chosen) >= 10
              OR $1 IS NULL AND (SELECT is_short FROM shortness) AS has_chosen_hits,
              count(*) < 1000 OR count(*) FILTER (WHERE is_hit) >= 10 OR (SELECT is_short FROM shortness) AS has_hits
         FROM (SELECT contains_text(description, $9, $10) AS is_hit,
                      $1::text[] IS NULL OR status = ANY ($1) AND source = ANY ($2::text[]) AS is_chosen
                 FROM incidents_between($3, $4, $5) ORDER BY created_at DESC, id DESC LIMIT 1000) AS newest),
       page AS ((SELECT created_at, id, incident
          FROM incidents_between($3, $4, $5) AS incident
         WHERE (SELECT has_chosen_hits FROM sample) AND contains_text(description, $9, $10)
           AND ($1 IS NULL OR status = ANY ($1) AND source = ANY ($2))
         ORDER BY created_at DESC, id DESC LIMIT $6::integer + 1) UNION ALL
       SELECT newest.created_at, newest.id, newest.incident
         FROM unnest($1) AS wanted_status (status) CROSS JOIN unnest($2) AS wanted_source (source) CROSS JOIN LATERAL (
              SELECT created_at, id, incident
                FROM incidents_between($3, $4, $5) AS incident
               WHERE (SELECT has_hits AND NOT has_chosen_hits FROM sample) AND contains_text(description, $9, $10)
                 AND status = wanted_status.status AND source = wanted_source.source
               ORDER BY created_at DESC, id DESC LIMIT $6 + 1) AS newest
        UNION ALL
       (SELECT hit.created_at, hit.id, incident FROM (SELECT created_at, id FROM incident_texts
                 WHERE NOT (SELECT has_hits FROM sample) AND description ILIKE $9 AND created_at >= coalesce($3, '-infinity')
                   AND (created_at, id) < (coalesce($4, 'infinity'), coalesce($5, 0)) ORDER BY created_at DESC, id DESC) AS hit
               CROSS JOIN LATERAL (SELECT incident FROM incidents AS incident WHERE incident.id = hit.id OFFSET 0) AS found
         WHERE $1 IS NULL OR (found.incident).status = ANY ($1) AND (found.incident).source = ANY ($2)
         ORDER BY hit.created_at DESC, hit.id DESC LIMIT $6 + 1)
        ORDER BY created_at DESC, id DESC LIMIT $6 + 1),
       arrays AS (
       SELECT array_agg(id) AS ids, array_agg(created_at) AS times, array_agg(incident_line(incident, $7)) AS lines FROM page)
SELECT convert_to(coalesce(array_to_string(lines[:$6], $8), ''), 'UTF8') AS body,
       coalesce(cardinality(ids) > $6, false) AS has_more, ROW(times[$6], ids[$6]) AS position
  FROM arrays;
