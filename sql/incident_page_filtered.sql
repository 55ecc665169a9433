-- One page of the incidents in some statuses and from some sources: as incident_page.sql.
--   $1 statuses  text[]
--   $2 sources   text[]
--   $3 since     timestamptz  created then or later, null for any
--   $4 until     timestamptz  created before then, null for any
--   $5 after     text         the cursor from the page before, null for the first page
--   $6 size      integer      incidents at most
--   $7 form      text         json, ndjson or csv
--   $8 opens     boolean      whether the list begins with this page
--   $9 closes    boolean      whether it ends with this page, even if more incidents follow
-- Each status and source is read newest first from its own stretch of the index, so that a rare one
-- costs no walk through the others, whichever plan the server keeps for the prepared statement.
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
       page AS (
       SELECT newest.*, row_number() OVER (ORDER BY created_at DESC, id DESC) AS place
         FROM unnest($1::text[]) AS wanted_status (status)
              CROSS JOIN unnest($2::text[]) AS wanted_source (source)
              CROSS JOIN LATERAL (
              SELECT created_at, id, incidents AS incident
                FROM incidents
               WHERE incidents.status = wanted_status.status
                 AND incidents.source = wanted_source.source
                 AND (created_at, id) < ((SELECT created_at FROM bound), (SELECT id FROM bound))
                 AND created_at >= (SELECT since FROM bound)
               ORDER BY created_at DESC, id DESC
               LIMIT $6 + 1) AS newest
        ORDER BY created_at DESC, id DESC
        LIMIT $6 + 1)
SELECT list_part($7, coalesce(string_agg(incident_line(incident, $7), CASE $7::text WHEN 'json' THEN E',\n' ELSE '' END
                                      ORDER BY created_at DESC, id DESC) FILTER (WHERE place <= $6), ''),
                 $8, $9 OR count(*) <= $6) AS body,
       CASE WHEN count(*) > $6 THEN cursor_after(max(id) FILTER (WHERE place = $6)) END AS next
  FROM page;
