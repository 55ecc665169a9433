-- read, at most 30 s, 1 at once
--
-- How many incidents there are by status and by source, and how many seconds passed from creation
-- to the first time in progress and to the first time resolved: mean, median and 95th percentile,
-- null when no incident reached it. With by_day, also the same for each day in UTC.
--   $1 since   timestamptz  created at this time or later, null for no bound
--   $2 until   timestamptz  created before this time, null for no bound
--   $3 by_day  boolean      since and until must be given too
  WITH counted AS (
       SELECT CASE WHEN $3::boolean THEN (created_at AT TIME ZONE 'UTC')::date END AS day,
              status, source,
              extract(epoch FROM in_progress_at - created_at) AS to_in_progress,
              extract(epoch FROM resolved_at - created_at) AS to_resolved
         FROM incidents
        WHERE created_at >= coalesce($1::timestamptz, '-infinity')
          AND created_at < coalesce($2::timestamptz, 'infinity')

        UNION ALL

       -- A row of nulls for each day, so that days without incidents appear too; count(status)
       -- skips it.
       SELECT first_day + number, NULL, NULL, NULL, NULL
         FROM (SELECT ($1 AT TIME ZONE 'UTC')::date,
                      ($2 AT TIME ZONE 'UTC' - interval '1 microsecond')::date)
              AS bounds (first_day, last_day)
              CROSS JOIN LATERAL generate_series(0, last_day - first_day) AS number
        WHERE $3),

       -- The whole period once, and each of its days.
       figures AS (
       SELECT day,
              grouping(day) = 1 AS is_whole,
              json_build_object(
                  'incidents', count(status),
                  'by_status', json_build_object(
                      'open', count(*) FILTER (WHERE status = 'open'),
                      'in_progress', count(*) FILTER (WHERE status = 'in_progress'),
                      'resolved', count(*) FILTER (WHERE status = 'resolved'),
                      'closed', count(*) FILTER (WHERE status = 'closed')),
                  'by_source', json_build_object(
                      'operator', count(*) FILTER (WHERE source = 'operator'),
                      'monitoring', count(*) FILTER (WHERE source = 'monitoring'),
                      'partner', count(*) FILTER (WHERE source = 'partner')),
                  'seconds_to', json_build_object(
                      'in_progress', json_build_object(
                          'count', count(to_in_progress),
                          'mean', round(avg(to_in_progress), 6),
                          'p50', percentile_cont(0.5) WITHIN GROUP (ORDER BY to_in_progress),
                          'p95', percentile_cont(0.95) WITHIN GROUP (ORDER BY to_in_progress)),
                      'resolved', json_build_object(
                          'count', count(to_resolved),
                          'mean', round(avg(to_resolved), 6),
                          'p50', percentile_cont(0.5) WITHIN GROUP (ORDER BY to_resolved),
                          'p95', percentile_cont(0.95) WITHIN GROUP (ORDER BY to_resolved)))
              ) AS body
         FROM counted
        GROUP BY GROUPING SETS ((), (day)))

SELECT CASE WHEN $3
            THEN jsonb_set(body::jsonb, '{days}', coalesce((
                     SELECT jsonb_agg(jsonb_build_object('day', day) || body::jsonb ORDER BY day)
                       FROM figures
                      WHERE NOT is_whole), '[]'))::json
            ELSE body END AS body
  FROM figures
 WHERE is_whole;
