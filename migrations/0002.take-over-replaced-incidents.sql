-- depends: 0001.schema
--
-- Copy the incidents of the replaced system, which 0000 has set aside: the same ids, texts and times.
-- The replaced database had no rule on the length of a description, so the rule applies only to ids
-- above the last one that it gave out.
DO $$
DECLARE
    last_id bigint;
BEGIN
    IF to_regclass('incidents_replaced') IS NULL OR EXISTS (SELECT FROM incidents) THEN
        RETURN;
    END IF;
    SELECT coalesce(max(id), 0) INTO last_id FROM incidents_replaced;

    ALTER TABLE incidents DROP CONSTRAINT incidents_description_check;
    EXECUTE format('ALTER TABLE incidents ADD CONSTRAINT incidents_description_check '
                   'CHECK (id <= %s OR char_length(description) BETWEEN 1 AND 5000)', last_id);

    -- Its enums are upper case ('IN_PROGRESS'), although its API spoke lower case.
    WITH taken_over AS (
         INSERT INTO incidents (id, description, status, source, created_at, updated_at)
         SELECT id, description, lower(status::text), lower(source::text), created_at, created_at
           FROM incidents_replaced
          ORDER BY id
         RETURNING id, created_at)
    INSERT INTO timeline (incident_id, kind, actor, created_at)
    SELECT id, 'created', 'replaced system', created_at
      FROM taken_over
     ORDER BY id;

    PERFORM setval(pg_get_serial_sequence('incidents', 'id'),
                   greatest(last_id, replaced.last_value), last_id > 0 OR replaced.is_called)
       FROM incidents_replaced_id_seq AS replaced;
END
$$;
