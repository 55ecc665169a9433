-- How many incidents there are by status and by source, and how long they took from their creation to
-- the first time in progress and resolved: mean, median and 95th percentile, null when none got there.
--   $1 since  timestamptz  created then or later, null for any
--   $2 until  timestamptz  created before then, null for any
  WITH chosen AS (
       SELECT id, status, source, created_at
         FROM incidents
        WHERE created_at >= coalesce($1::timestamptz, '-infinity')
          AND (created_at, id) < (coalesce($2::timestamptz, 'infinity'),
                                  CASE WHEN $2 IS NULL THEN 9223372036854775807 ELSE 0 END)),
       counts AS (
       SELECT count(*) AS incidents,
              json_build_object(
                  'open', count(*) FILTER (WHERE status = 'open'),
                  'in_progress', count(*) FILTER (WHERE status = 'in_progress'),
                  'resolved', count(*) FILTER (WHERE status = 'resolved'),
                  'closed', count(*) FILTER (WHERE status = 'closed')) AS by_status,
              json_build_object(
                  'operator', count(*) FILTER (WHERE source = 'operator'),
                  'monitoring', count(*) FILTER (WHERE source = 'monitoring'),
                  'partner', count(*) FILTER (WHERE source = 'partner')) AS by_source
         FROM chosen),
       reached AS (
       SELECT to_value AS status, extract(epoch FROM min(timeline.created_at) - chosen.created_at) AS seconds
         FROM timeline
              JOIN chosen ON chosen.id = incident_id
        WHERE kind = 'status' AND to_value IN ('in_progress', 'resolved')
        GROUP BY chosen.id, chosen.created_at, to_value),
       durations AS (
       SELECT wanted.status,
              json_build_object(
                  'count', count(seconds), 'mean', round(avg(seconds), 6),
                  'p50', percentile_cont(0.5) WITHIN GROUP (ORDER BY seconds),
                  'p95', percentile_cont(0.95) WITHIN GROUP (ORDER BY seconds)) AS figures
         FROM (VALUES ('in_progress'), ('resolved')) AS wanted (status)
              LEFT JOIN reached USING (status)
        GROUP BY wanted.status)
SELECT json_build_object(
           'incidents', incidents, 'by_status', by_status, 'by_source', by_source,
           'seconds_to', (SELECT json_object_agg(status, figures ORDER BY status) FROM durations)) AS body
  FROM counts;
