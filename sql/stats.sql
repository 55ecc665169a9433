-- read, at most 30 s, 1 at once
--
-- How many incidents there are by status and by source, and how many seconds passed from creation to
-- the first time in progress and to the first time resolved: mean, median and 95th percentile. They
-- are null when no incident got there. seconds is how long it took to count all this.
--   $1 since     timestamptz  created at this time or later, null for no bound
--   $2 until     timestamptz  created before this time, null for no bound
--   $3 statuses  text[]       all statuses
--   $4 sources   text[]       all sources
  WITH chosen AS MATERIALIZED (
       SELECT status, source, in_progress_at - created_at AS time_to_in_progress, resolved_at - created_at AS time_to_resolved
         FROM incidents
        WHERE created_at >= coalesce($1::timestamptz, '-infinity') AND created_at < coalesce($2::timestamptz, 'infinity')),
       grouped AS (
       SELECT status, source, count(*) AS incidents
         FROM chosen
        GROUP BY status, source),
       first_times AS (
       SELECT 'in_progress' AS status, extract(epoch FROM time_to_in_progress) AS seconds
         FROM chosen
        WHERE time_to_in_progress IS NOT NULL
        UNION ALL
       SELECT 'resolved', extract(epoch FROM time_to_resolved)
         FROM chosen
        WHERE time_to_resolved IS NOT NULL),
       durations AS (
       SELECT wanted.status,
              json_build_object(
                  'count', count(seconds), 'mean', round(avg(seconds), 6),
                  'p50', percentile_cont(0.5) WITHIN GROUP (ORDER BY seconds),
                  'p95', percentile_cont(0.95) WITHIN GROUP (ORDER BY seconds)) AS figures
         FROM (VALUES ('in_progress'), ('resolved')) AS wanted (status)
              LEFT JOIN first_times USING (status)
        GROUP BY wanted.status)
SELECT json_build_object(
           'incidents', (SELECT coalesce(sum(incidents), 0) FROM grouped),
           'by_status', (SELECT json_object_agg(name, (
                             SELECT coalesce(sum(incidents), 0) FROM grouped WHERE status = name))
                           FROM unnest($3::text[]) AS name),
           'by_source', (SELECT json_object_agg(name, (
                             SELECT coalesce(sum(incidents), 0) FROM grouped WHERE source = name))
                           FROM unnest($4::text[]) AS name),
           'seconds_to', (SELECT json_object_agg(status, figures ORDER BY status) FROM durations)) AS body,
       extract(epoch FROM clock_timestamp() - statement_timestamp())::float AS seconds;
