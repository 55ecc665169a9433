-- Make room for the table "incidents" of 0001.schema.sql.
--
-- The table of the replaced system (FastAPI, SQLAlchemy) has the same name. It is recognised by its
-- columns and renamed; 0002 copies its rows. Any other table called "incidents" belongs to somebody
-- else, so the migration stops and leaves it alone.
DO $$
DECLARE
    columns text;
    table_name text;
    unknown record;
BEGIN
    IF to_regproc('cursor_after') IS NOT NULL THEN
        RAISE EXCEPTION 'this database was made by a version from before release 1.0: save its incidents '
                        'with that version (GET /incidents/?format=ndjson), then use a new database';
    END IF;

    -- 0001 has been applied already, and only yoyo's note of it was lost: the table is ours.
    IF to_regproc('claim_idempotency_keys') IS NOT NULL THEN
        RETURN;
    END IF;

    SELECT string_agg(attname || ' ' || format_type(atttypid, NULL), ', ' ORDER BY attnum)
      INTO columns
      FROM pg_attribute
           JOIN pg_class ON pg_class.oid = attrelid AND relkind = 'r'
     WHERE attrelid = to_regclass('incidents') AND attnum > 0 AND NOT attisdropped;

    IF columns = 'id integer, description character varying, status incidentstatus, '
                 'source incidentsource, created_at timestamp with time zone' THEN
        -- What 0002 could not copy is refused here, while the replaced system can still run.
        SELECT id, status, source INTO unknown
          FROM incidents
         WHERE upper(status::text) NOT IN ('OPEN', 'IN_PROGRESS', 'RESOLVED', 'CLOSED')
            OR upper(source::text) NOT IN ('OPERATOR', 'MONITORING', 'PARTNER')
         LIMIT 1;
        IF FOUND THEN
            RAISE EXCEPTION 'incident % has the status % and the source %, of which one is not known here; '
                            'the database was left as it is: change that incident, then start again',
                            unknown.id, unknown.status, unknown.source;
        END IF;
        ALTER TABLE incidents RENAME TO incidents_replaced;
        ALTER INDEX IF EXISTS incidents_pkey RENAME TO incidents_replaced_pkey;
        ALTER SEQUENCE IF EXISTS incidents_id_seq RENAME TO incidents_replaced_id_seq;
    ELSIF to_regclass('incidents') IS NOT NULL THEN
        RAISE EXCEPTION 'the database has a table "incidents" of another shape (%); '
                        'it was left as it is: rename it, or use another database',
                        coalesce(columns, 'no table, or one without columns');
    END IF;

    -- CREATE TABLE IF NOT EXISTS in 0001 would take these for its own.
    FOREACH table_name IN ARRAY ARRAY['timeline', 'incident_texts', 'idempotency_keys'] LOOP
        IF to_regclass(table_name) IS NOT NULL THEN
            RAISE EXCEPTION 'the database has a table "%" that is not of this service; '
                            'it was left as it is: rename it, or use another database', table_name;
        END IF;
    END LOOP;
END
$$;
