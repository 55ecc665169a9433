-- Forget the incidents that were taken over, and those reported since; 0000 keeps their old table.
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
