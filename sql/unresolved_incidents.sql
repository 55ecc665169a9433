-- read, at most 8 s, 1 at once
--
-- How many incidents there are of each status and source, and how old the oldest open one is, in
-- seconds, or null.
--   $1 statuses  text[]  open and in_progress
--   $2 sources   text[]
-- An index-only scan: incidents are read only where they changed since the last vacuum.
SELECT array_agg(status) AS statuses,
       array_agg(source) AS sources,
       array_agg(number) AS numbers,
       (extract(epoch FROM now() - min(oldest_at) FILTER (WHERE status = 'open')))::float8
       AS oldest_open_seconds
  FROM unnest($1::text[]) AS wanted_status (status)
       CROSS JOIN unnest($2::text[]) AS wanted_source (source)
       CROSS JOIN LATERAL (
       SELECT count(*) AS number, min(created_at) AS oldest_at
         FROM incidents
        WHERE incidents.status = wanted_status.status
          AND incidents.source = wanted_source.source) AS counted;
