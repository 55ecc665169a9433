-- depends: 0002.functions
-- Bring a database of the previous version up to date, or copy the replaced system's incidents.
SET lock_timeout = '3s';
-- The dedup_keys of the previous version get the columns that they have in 0001. They are locked
-- before the timeline, as events lock them: the other order could end in a deadlock.
ALTER TABLE dedup_keys
    ADD COLUMN IF NOT EXISTS description text,
    ADD COLUMN IF NOT EXISTS labels jsonb,
    ADD COLUMN IF NOT EXISTS started_at timestamptz,
    ADD COLUMN IF NOT EXISTS changed_at timestamptz;
-- The previous version added this constraint NOT VALID. Validating it blocks writes for 0.4 s per
-- million entries.
ALTER DOMAIN timeline_field VALIDATE CONSTRAINT timeline_field_check;

-- The incidents of the replaced system keep their ids, texts and times. That system had no rule on
-- the length of a description, so ours holds only for ids after its last one.
DO $$
DECLARE
    last_id bigint;
BEGIN
    IF to_regclass('incidents_replaced') IS NULL OR EXISTS (SELECT FROM timeline) THEN
        RETURN; -- There are none, or they were copied already.
    END IF;
    SELECT coalesce(max(id), 0) INTO last_id FROM incidents_replaced;
    EXECUTE format(
        'ALTER TABLE incidents DROP CONSTRAINT incidents_description_check, '
        'ADD CONSTRAINT incidents_description_check '
        'CHECK (id <= %s OR char_length(description) BETWEEN 1 AND 5000)', last_id);

    -- The enums of the replaced system are upper case: 'IN_PROGRESS'.
    WITH taken_over AS (
         INSERT INTO incidents (id, description, status, source, created_at, updated_at)
         SELECT id, description, lower(status::text), lower(source::text), created_at, created_at
           FROM incidents_replaced ORDER BY id
         RETURNING id, created_at)
    INSERT INTO timeline (incident_id, kind, actor, created_at)
    SELECT id, 'created', 'replaced system', created_at
      FROM taken_over ORDER BY id;

    PERFORM setval('incidents_id_seq', 1 + greatest(last_id, pg_sequence_last_value(
        pg_get_serial_sequence('incidents_replaced', 'id')::regclass)), false);
END
$$;
