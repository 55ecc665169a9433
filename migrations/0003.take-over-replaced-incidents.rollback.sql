-- Stop the service first. This forgets the incidents that were taken over, and all that was
-- reported since, also where the previous version had taken them over.
SET lock_timeout = '3s';
DO $$
BEGIN
    IF to_regclass('incidents_replaced') IS NOT NULL THEN
        ALTER TABLE timeline DISABLE TRIGGER timeline_append_only;
        TRUNCATE incidents, incident_texts, timeline, idempotency_keys, dedup_keys RESTART IDENTITY;
        ALTER TABLE timeline ENABLE TRIGGER timeline_append_only;
        ALTER TABLE incidents DROP CONSTRAINT incidents_description_check,
            ADD CONSTRAINT incidents_description_check
            CHECK (char_length(description) BETWEEN 1 AND 5000);
    END IF;
END
$$;
