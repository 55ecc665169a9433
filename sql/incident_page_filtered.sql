-- One page of the incidents in some statuses, newest first: as incident_page.sql.
--   $1 statuses  text[]
--   $2 sources   text[]
--   $3 after     bigint   the id of the last incident of the page before, null for the first page
--   $4 size      integer  incidents at most
-- Each status and source is read newest first from its own stretch of the index, so that a rare one
-- costs no walk through the others, whichever plan the server keeps for the prepared statement.
  WITH page AS (
       SELECT newest.*, row_number() OVER (ORDER BY created_at DESC, id DESC) AS place
         FROM unnest($1::text[]) AS wanted_status (status)
              CROSS JOIN unnest($2::text[]) AS wanted_source (source)
              CROSS JOIN LATERAL (
              SELECT created_at, id, incidents AS incident
                FROM incidents
               WHERE incidents.status = wanted_status.status
                 AND incidents.source = wanted_source.source
                 AND (created_at, id) < (coalesce((SELECT created_at FROM incidents WHERE id = $3), 'infinity'),
                                         coalesce($3, 9223372036854775807))
               ORDER BY created_at DESC, id DESC
               LIMIT $4 + 1) AS newest
        ORDER BY created_at DESC, id DESC
        LIMIT $4 + 1)
SELECT convert_to(string_agg(incident_json(incident), E',\n' ORDER BY place)
                  FILTER (WHERE place <= $4), 'UTF8') AS body,
       CASE WHEN count(*) > $4 THEN max(id) FILTER (WHERE place = $4) END AS next
  FROM page;
