-- One page of all incidents, newest first: a line of JSON each, and where the next page starts.
-- body is null when there is none; next is null when this page is the last.
--   $1 after  bigint   the id of the last incident of the page before, null for the first page
--   $2 size   integer  incidents at most
  WITH page AS (
       SELECT id, incident_json(incidents) AS line,
              row_number() OVER (ORDER BY created_at DESC, id DESC) AS place
         FROM incidents
        WHERE (created_at, id) < (coalesce((SELECT created_at FROM incidents WHERE id = $1), 'infinity'),
                                  coalesce($1, 9223372036854775807))
        ORDER BY created_at DESC, id DESC
        LIMIT $2 + 1)
SELECT convert_to(string_agg(line, E',\n' ORDER BY place) FILTER (WHERE place <= $2), 'UTF8') AS body,
       CASE WHEN count(*) > $2 THEN max(id) FILTER (WHERE place = $2) END AS next
  FROM page;
