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
       reached AS (
       SELECT to_value AS status, extract(epoch FROM min(timeline.created_at) - chosen.created_at) AS seconds
         FROM timeline
              JOIN chosen ON chosen.id = incident_id
        WHERE kind = 'status' AND to_value IN ('in_progress', 'resolved')
        GROUP BY chosen.id, chosen.created_at, to_value),
       durations AS (
       SELECT wanted.status,
              json_build_object(
                  'count', count(seconds), 'mean', avg(seconds),
                  'p50', percentile_cont(0.5) WITHIN GROUP (ORDER BY seconds),
                  'p95', percentile_cont(0.95) WITHIN GROUP (ORDER BY seconds)) AS figures
         FROM unnest('{in_progress,resolved}'::text[]) AS wanted (status)
              LEFT JOIN reached USING (status)
        GROUP BY wanted.status),
       by_status AS (
       SELECT wanted.status, count(id) AS incidents
         FROM unnest('{open,in_progress,resolved,closed}'::text[]) AS wanted (status)
              LEFT JOIN chosen USING (status)
        GROUP BY wanted.status),
       by_source AS (
       SELECT wanted.source, count(id) AS incidents
         FROM unnest('{operator,monitoring,partner}'::text[]) AS wanted (source)
              LEFT JOIN chosen USING (source)
        GROUP BY wanted.source)
SELECT json_build_object(
           'incidents', (SELECT count(*) FROM chosen),
           'by_status', (SELECT json_object_agg(status, incidents) FROM by_status),
           'by_source', (SELECT json_object_agg(source, incidents) FROM by_source),
           'seconds_to', (SELECT json_object_agg(status, figures) FROM durations)) AS body;
