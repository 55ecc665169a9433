-- One page of the incidents whose description has a text in it, in any case: as incident_page.sql.
--   $1 statuses  text[]
--   $2 sources   text[]
--   $3 since     timestamptz  created then or later, null for any
--   $4 until     timestamptz  created before then, null for any
--   $5 after     text         the cursor from the page before, null for the first page
--   $6 size      integer      incidents at most
--   $7 form      text         json, ndjson or csv
--   $8 opens     boolean      whether the list begins with this page
--   $9 closes    boolean      whether it ends with this page, even if more incidents follow
--   $10 q        text         the text, in which %, _ and \ stand for themselves
-- The next incidents of all (newest) decide which way is short, so that no plan depends on statistics:
-- they fill the page themselves; or the text is frequent, but not in these statuses and sources, and is
-- sought in their stretches of the index; or it is rare, and found by its trigrams.
  WITH bound AS (
       SELECT coalesce($3::timestamptz, '-infinity') AS since, created_at, id
         FROM (SELECT coalesce($4::timestamptz, 'infinity'),
                      CASE WHEN $4 IS NULL THEN 9223372036854775807 ELSE 0 END
                UNION ALL
               SELECT created_at, id
                 FROM incidents
                WHERE id = cursor_id($5)) AS before (created_at, id)
        ORDER BY created_at, id
        LIMIT 1),
       newest AS MATERIALIZED (
       SELECT created_at, id, incidents AS incident, pattern, description ILIKE pattern AS hit,
              status = ANY ($1) AND source = ANY ($2) AS chosen
         FROM incidents
              CROSS JOIN (SELECT '%' || regexp_replace($10, '([\\%_])', '\\\1', 'g') || '%') AS wanted (pattern)
        WHERE (created_at, id) < ((SELECT created_at FROM bound), (SELECT id FROM bound))
          AND created_at >= (SELECT since FROM bound)
        ORDER BY created_at DESC, id DESC
        LIMIT 20 * $6),
       shortest AS (
       SELECT CASE WHEN count(*) FILTER (WHERE hit AND chosen) > $6 THEN 'newest'
                   WHEN count(*) FILTER (WHERE hit) > $6 THEN 'stretches'
                   ELSE 'trigrams' END AS way, max(pattern) AS pattern
         FROM newest),
       rare AS MATERIALIZED (
       SELECT created_at, id, status, source, incidents AS incident
         FROM incidents
        WHERE id = ANY (ARRAY (
              SELECT id
                FROM incident_texts
               WHERE (SELECT way FROM shortest) = 'trigrams'
                 AND description ILIKE (SELECT pattern FROM shortest)))),
       page AS (
       SELECT found.*, row_number() OVER (ORDER BY created_at DESC, id DESC) AS place
         FROM (SELECT created_at, id, incident
                 FROM newest
                WHERE hit AND chosen AND (SELECT way FROM shortest) = 'newest'
                UNION ALL
               SELECT stretch.*
                 FROM unnest($1::text[]) AS wanted_status (status)
                      CROSS JOIN unnest($2::text[]) AS wanted_source (source)
                      CROSS JOIN LATERAL (
                      SELECT created_at, id, incidents AS incident
                        FROM incidents
                       WHERE incidents.status = wanted_status.status
                         AND incidents.source = wanted_source.source
                         AND description ILIKE (SELECT pattern FROM shortest)
                         AND (created_at, id) < ((SELECT created_at FROM bound), (SELECT id FROM bound))
                         AND created_at >= (SELECT since FROM bound)
                       ORDER BY created_at DESC, id DESC
                       LIMIT $6 + 1) AS stretch
                WHERE (SELECT way FROM shortest) = 'stretches'
                UNION ALL
               SELECT created_at, id, incident
                 FROM rare
                WHERE status = ANY ($1) AND source = ANY ($2)
                  AND (created_at, id) < ((SELECT created_at FROM bound), (SELECT id FROM bound))
                  AND created_at >= (SELECT since FROM bound)) AS found
        ORDER BY created_at DESC, id DESC
        LIMIT $6 + 1)
SELECT list_part($7, coalesce(string_agg(incident_line(incident, $7), CASE $7::text WHEN 'json' THEN E',\n' ELSE '' END
                                      ORDER BY created_at DESC, id DESC) FILTER (WHERE place <= $6), ''),
                 $8, $9 OR count(*) <= $6) AS body,
       CASE WHEN count(*) > $6 THEN cursor_after(max(id) FILTER (WHERE place = $6)) END AS next
  FROM page;
