-- Forget the incidents that were taken over, and all that was reported since. 0000 keeps the old
-- table. This deletes everything also where the version before had taken over: restore a backup.
SET lock_timeout = '3s';
DO $$
BEGIN
    IF to_regclass('incidents_replaced') IS NOT NULL THEN
        LOCK TABLE incidents; -- before timeline, as the service does
        ALTER TABLE timeline DISABLE TRIGGER timeline_append_only;
        TRUNCATE incidents, incident_texts, timeline, idempotency_keys, dedup_keys RESTART IDENTITY;
        ALTER TABLE timeline ENABLE TRIGGER timeline_append_only;
        ALTER TABLE incidents DROP CONSTRAINT incidents_description_check,
            ADD CONSTRAINT incidents_description_check
            CHECK (char_length(description) BETWEEN 1 AND 5000);
    END IF;
END
$$;
