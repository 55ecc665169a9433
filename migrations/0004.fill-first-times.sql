-- depends: 0003.add-first-times
-- transactional: false
--
-- Fill the columns of 0003 for the incidents that are there, from their timelines. It is done in parts,
-- each with its own commit: a change of an incident waits for one part only, not for all of them.
-- A change that comes in between has set a later time at most, so the earliest one wins.
DO $$
DECLARE
    part_size constant bigint := 10000;
BEGIN
    FOR part IN 0 .. (SELECT coalesce(max(id), 0) FROM incidents) / part_size LOOP
        UPDATE incidents
           SET in_progress_at = least(incidents.in_progress_at, first_times.in_progress_at),
               resolved_at = least(incidents.resolved_at, first_times.resolved_at)
          FROM (SELECT incident_id, min(created_at) FILTER (WHERE to_value = 'in_progress') AS in_progress_at,
                       min(created_at) FILTER (WHERE to_value = 'resolved') AS resolved_at
                  FROM timeline
                 WHERE kind = 'status' AND to_value IN ('in_progress', 'resolved')
                   AND incident_id >= part * part_size AND incident_id < (part + 1) * part_size
                 GROUP BY incident_id) AS first_times
         WHERE incidents.id = first_times.incident_id
           AND (incidents.in_progress_at, incidents.resolved_at)
               IS DISTINCT FROM (least(incidents.in_progress_at, first_times.in_progress_at),
                                 least(incidents.resolved_at, first_times.resolved_at));
        COMMIT;
    END LOOP;
END
$$;
