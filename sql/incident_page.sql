-- One page of all incidents, newest first: its part of the list, and the cursor to the page after it,
-- null when this page is the last.
--   $1 since   timestamptz  created then or later, null for any
--   $2 until   timestamptz  created before then, null for any
--   $3 after   text         the cursor from the page before, null for the first page
--   $4 size    integer      incidents at most
--   $5 form    text         json, ndjson or csv
--   $6 opens   boolean      whether the list begins with this page
--   $7 closes  boolean      whether it ends with this page, even if more incidents follow
-- The upper bounds are made one (bound): of two, an index scan starts from one and walks to the other.
  WITH bound AS (
       SELECT coalesce($1::timestamptz, '-infinity') AS since, created_at, id
         FROM (SELECT coalesce($2::timestamptz, 'infinity'),
                      CASE WHEN $2 IS NULL THEN 9223372036854775807 ELSE 0 END
                UNION ALL
               SELECT created_at, id
                 FROM incidents
                WHERE id = cursor_id($3)) AS before (created_at, id)
        ORDER BY created_at, id
        LIMIT 1),
       page AS (
       SELECT created_at, id, incident_line(incidents, $5) AS line,
              row_number() OVER (ORDER BY created_at DESC, id DESC) AS place
         FROM incidents
        WHERE (created_at, id) < ((SELECT created_at FROM bound), (SELECT id FROM bound))
          AND created_at >= (SELECT since FROM bound)
        ORDER BY created_at DESC, id DESC
        LIMIT $4 + 1)
SELECT list_part($5, coalesce(string_agg(line, CASE $5::text WHEN 'json' THEN E',\n' ELSE '' END
                                      ORDER BY created_at DESC, id DESC) FILTER (WHERE place <= $4), ''),
                 $6, $7 OR count(*) <= $4) AS body,
       CASE WHEN count(*) > $4 THEN cursor_after(max(id) FILTER (WHERE place = $4)) END AS next
  FROM page;
