-- depends: 0002.functions
-- Copy the incidents of the replaced system, which 0000 has set aside: the same ids, texts, times.
-- It had no rule on the length of a description, so ours applies above the last of its ids only.
SET lock_timeout = '3s';
-- And check a rule that the version before had not checked for the entries that were there.
ALTER DOMAIN timeline_field VALIDATE CONSTRAINT timeline_field_check;
DO $$
DECLARE
    last_id bigint;
BEGIN
    IF to_regclass('incidents_replaced') IS NULL OR EXISTS (SELECT FROM timeline) THEN
        RETURN;
    END IF;
    SELECT coalesce(max(id), 0) INTO last_id FROM incidents_replaced;
    EXECUTE format(
        'ALTER TABLE incidents DROP CONSTRAINT incidents_description_check, '
        'ADD CONSTRAINT incidents_description_check '
        'CHECK (id <= %s OR char_length(description) BETWEEN 1 AND 5000)', last_id);

    -- Its enums are upper case ('IN_PROGRESS'), although its API spoke lower case.
    WITH taken_over AS (
         INSERT INTO incidents (id, description, status, source, created_at, updated_at)
         SELECT id, description, lower(status::text), lower(source::text), created_at, created_at
           FROM incidents_replaced ORDER BY id
         RETURNING id, created_at)
    INSERT INTO timeline (incident_id, kind, actor, created_at)
    SELECT id, 'created', 'replaced system', created_at
      FROM taken_over ORDER BY id;

    last_id := greatest(last_id, pg_sequence_last_value(
        pg_get_serial_sequence('incidents_replaced', 'id')::regclass));
    IF last_id > 0 THEN
        PERFORM setval('incidents_id_seq', last_id);
    END IF;
END
$$;
