-- The timeline keeps these times. The function is made again, because its * stands for columns that go.
DROP FUNCTION incidents_between;
DROP TRIGGER incidents_set_first_times ON incidents;
DROP FUNCTION set_first_times;
ALTER TABLE incidents DROP COLUMN in_progress_at, DROP COLUMN resolved_at;

CREATE FUNCTION incidents_between(since timestamptz, before_created_at timestamptz, before_id bigint)
    RETURNS SETOF incidents
    LANGUAGE sql STABLE PARALLEL SAFE
    BEGIN ATOMIC
    SELECT *
      FROM incidents
     WHERE created_at >= coalesce(since, '-infinity')
       AND (created_at, id) < (coalesce(before_created_at, 'infinity'), coalesce(before_id, 0));
    END;
