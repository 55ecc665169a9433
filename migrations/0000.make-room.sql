-- Make room for the tables of 0001. The replaced system (FastAPI, SQLAlchemy) has a table called
-- "incidents" too; it is renamed, and 0003 copies its rows. Somebody else's tables are left alone.
-- "The previous version" is that of commit 5d17a7d, the last one before release 1.0.
SET lock_timeout = '3s';
DO $$
DECLARE
    columns text;
    unknown record;
    taken_name text;
BEGIN
    -- Only this service has this domain, so the tables are its own. 0001 makes all of them at once,
    -- but the previous version made them step by step, and dedup_keys last.
    IF to_regtype('timeline_note') IS NOT NULL THEN
        IF to_regclass('dedup_keys') IS NULL THEN
            RAISE EXCEPTION 'this database stands between two versions; it was left as it is: '
                'start the service of commit 5d17a7d on it once, then this one';
        END IF;
        RETURN;
    END IF;

    SELECT string_agg(attname || ' ' || format_type(atttypid, NULL), ', ' ORDER BY attnum)
      INTO columns
      FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid AND relkind = 'r'
     WHERE attrelid = to_regclass('incidents') AND attnum > 0 AND NOT attisdropped;
    IF columns = 'id integer, description character varying, status incidentstatus, '
                 'source incidentsource, created_at timestamp with time zone' THEN
        -- A word that 0003 could not copy is refused here, while the replaced system can still run.
        LOCK TABLE incidents;
        SELECT id, status, source INTO unknown
          FROM incidents
         WHERE (upper(status::text) IN ('OPEN', 'IN_PROGRESS', 'RESOLVED', 'CLOSED')
                AND upper(source::text) IN ('OPERATOR', 'MONITORING', 'PARTNER')) IS NOT TRUE
         LIMIT 1;
        IF FOUND THEN
            RAISE EXCEPTION 'incident % has an unknown status (%) or source (%), so nothing was '
                'changed: correct it, then start again', unknown.id, unknown.status, unknown.source;
        END IF;
        ALTER TABLE incidents RENAME TO incidents_replaced;
        ALTER INDEX IF EXISTS incidents_pkey RENAME TO incidents_replaced_pkey;
        ALTER SEQUENCE IF EXISTS incidents_id_seq RENAME TO incidents_replaced_id_seq;
    END IF;

    -- CREATE TABLE IF NOT EXISTS in 0001 would take these for its own.
    SELECT name INTO taken_name
      FROM unnest('{incidents,timeline,incident_texts,idempotency_keys,dedup_keys}'::text[]) AS name
     WHERE to_regclass(name) IS NOT NULL;
    IF FOUND THEN
        RAISE EXCEPTION 'the database has a table "%" that does not belong to this service; '
            'it was left as it is: rename it, or use another database', taken_name;
    END IF;
END
$$;
