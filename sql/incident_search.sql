-- kind: read, single
--
-- One page of the incidents whose description contains a text, in any case. The parameters and the row
-- are those of incident_page.sql.
--   $1 statuses           text[]
--   $2 sources            text[]
--   $3 since              timestamptz
--   $4 before_created_at  timestamptz
--   $5 before_id          bigint
--   $6 size               integer
--   $7 format             text
--   $8 separator          text
--   $9 pattern            text         for ILIKE
-- A text is frequent if 10 of the newest 1,000 have it, or if there are fewer. It is found by walking along
-- the list, as in incident_page.sql; a rare one by its trigrams, of which a filter may drop some.
  WITH sample AS MATERIALIZED (
       SELECT count(*) < 1000 OR count(*) FILTER (WHERE description ILIKE $9) >= 10 AS is_frequent
         FROM (SELECT description FROM incidents_between($3, $4, $5)
                ORDER BY created_at DESC, id DESC LIMIT 1000) AS newest),
       page AS (
       (SELECT created_at, id, incident
          FROM incidents_between($3, $4, $5) AS incident
         WHERE $1::text[] IS NULL AND (SELECT is_frequent FROM sample) AND description ILIKE $9
         ORDER BY created_at DESC, id DESC LIMIT $6::integer + 1)
        UNION ALL
       SELECT newest.created_at, newest.id, newest.incident
         FROM unnest($1::text[]) AS wanted_status (status) CROSS JOIN unnest($2::text[]) AS wanted_source (source)
              CROSS JOIN LATERAL (
              SELECT created_at, id, incident
                FROM incidents_between($3, $4, $5) AS incident
               WHERE (SELECT is_frequent FROM sample) AND description ILIKE $9
                 AND status = wanted_status.status AND source = wanted_source.source
               ORDER BY created_at DESC, id DESC LIMIT $6 + 1) AS newest
        UNION ALL
       SELECT created_at, id, incident
         FROM incidents AS incident
        WHERE id = ANY (ARRAY (
              SELECT id FROM incident_texts
               WHERE NOT (SELECT is_frequent FROM sample) AND description ILIKE $9
                 AND created_at >= coalesce($3, '-infinity') AND (created_at, id) < (coalesce($4, 'infinity'), coalesce($5, 0))
               ORDER BY created_at DESC, id DESC LIMIT CASE WHEN $1 IS NULL THEN $6 + 1 END))
          AND ($1 IS NULL OR status = ANY ($1) AND source = ANY ($2))
        ORDER BY created_at DESC, id DESC
        LIMIT $6 + 1),
       arrays AS (
       SELECT array_agg(id) AS ids, array_agg(created_at) AS times, array_agg(incident_line(incident, $7)) AS lines
         FROM page)
SELECT convert_to(coalesce(array_to_string(lines[:$6], $8), ''), 'UTF8') AS body,
       coalesce(cardinality(ids) > $6, false) AS has_more, times[$6] AS last_created_at, ids[$6] AS last_id
  FROM arrays;
