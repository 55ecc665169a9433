-- yoyo runs these in the order written. The replaced system's table comes back under its own name
-- with the rows that it had at the take-over; what was reported since is dropped with the new tables.
DROP FUNCTION IF EXISTS incident_json(incidents);

DROP FUNCTION IF EXISTS rfc3339(timestamptz);

DROP TABLE IF EXISTS timeline;

DROP TABLE IF EXISTS incidents;

DROP DOMAIN IF EXISTS incident_status, incident_source, timeline_kind, timeline_field, timeline_note;

DO $$
BEGIN
    IF to_regclass('incidents_replaced') IS NOT NULL THEN
        ALTER TABLE incidents_replaced RENAME TO incidents;
        ALTER INDEX IF EXISTS incidents_replaced_pkey RENAME TO incidents_pkey;
        ALTER SEQUENCE IF EXISTS incidents_replaced_id_seq RENAME TO incidents_id_seq;
    END IF;
END
$$;
