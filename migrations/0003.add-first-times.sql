-- depends: 0002.take-over-replaced-incidents
--
-- When an incident was first in progress and first resolved, for stats.sql: to find these times on the
-- timeline took seconds from some 100,000 incidents on.
-- A trigger sets them, so that they are also right while a process of the version before still runs.
ALTER TABLE incidents ADD COLUMN IF NOT EXISTS in_progress_at timestamptz,
                      ADD COLUMN IF NOT EXISTS resolved_at timestamptz;

CREATE OR REPLACE FUNCTION set_first_times() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.status = 'in_progress' THEN
        NEW.in_progress_at := NEW.updated_at;
    ELSE
        NEW.resolved_at := NEW.updated_at;
    END IF;
    RETURN NEW;
END
$$;

CREATE OR REPLACE TRIGGER incidents_set_first_times
    BEFORE UPDATE ON incidents
    FOR EACH ROW WHEN (NEW.status <> OLD.status
                       AND (NEW.status = 'in_progress' AND NEW.in_progress_at IS NULL
                            OR NEW.status = 'resolved' AND NEW.resolved_at IS NULL))
    EXECUTE FUNCTION set_first_times();

-- The same function as in 0001, once more: its * stands for the columns that the table had then.
CREATE OR REPLACE FUNCTION incidents_between(since timestamptz, before_created_at timestamptz, before_id bigint)
    RETURNS SETOF incidents
    LANGUAGE sql STABLE PARALLEL SAFE
    BEGIN ATOMIC
    SELECT *
      FROM incidents
     WHERE created_at >= coalesce(since, '-infinity')
       AND (created_at, id) < (coalesce(before_created_at, 'infinity'), coalesce(before_id, 0));
    END;
