-- Everything that was reported is dropped with the tables.
DROP FUNCTION IF EXISTS timeline_json(timeline), incident_line(incidents, text), incident_csv(incidents),
    incident_json(incidents);

DROP FUNCTION IF EXISTS rfc3339(timestamptz);

DROP FUNCTION IF EXISTS incidents_between(timestamptz, timestamptz, bigint);

DROP TABLE IF EXISTS idempotency_keys, incident_texts, timeline, incidents;

DROP FUNCTION IF EXISTS claim_idempotency_keys(text[], text[], bytea[], regclass);

DROP FUNCTION IF EXISTS copy_changed_description(), copy_new_descriptions(), search_form(text), contains_text(text, text, boolean),
    refuse_timeline_change();

DROP DOMAIN IF EXISTS incident_status, incident_source, timeline_kind, timeline_field, timeline_note;

DROP EXTENSION IF EXISTS pg_trgm;
