-- Everything that was reported is dropped with the tables.
SET lock_timeout = '3s';
DROP TABLE IF EXISTS dedup_keys, idempotency_keys, incident_texts, timeline, incidents;
DROP DOMAIN IF EXISTS
    incident_status, incident_source, timeline_kind, timeline_field, timeline_note;
