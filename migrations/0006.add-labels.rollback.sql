-- The labels are lost; their entries on the timeline stay. The functions are restored before the columns are dropped,
-- because the new ones use them; only incidents_between() comes after them, because its * must not include them.
DROP FUNCTION choose_search;

DROP FUNCTION incident_matches;

DROP FUNCTION incident_texts_between, incidents_between;

CREATE OR REPLACE FUNCTION incident_json(incident incidents) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT '{"id":' || (incident).id || ',"description":' || to_json((incident).description)::text
        || ',"status":"' || (incident).status || '","source":"' || (incident).source
        || '","created_at":"' || rfc3339((incident).created_at)
        || '","updated_at":"' || rfc3339((incident).updated_at)
        || '","version":' || (incident).version || '}';
$$;

CREATE OR REPLACE FUNCTION incident_csv(incident incidents) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT format(
        '%s,"%s%s",%s,%s,%s,%s,%s',
        (incident).id, CASE WHEN (incident).description ~ '^[=+@\t\r\n-]' THEN '''' END,
        replace((incident).description, '"', '""'), (incident).status, (incident).source,
        rfc3339((incident).created_at), rfc3339((incident).updated_at), (incident).version);
$$;

CREATE OR REPLACE TRIGGER incidents_copy_changed_description
    AFTER UPDATE ON incidents
    FOR EACH ROW WHEN (NEW.description <> OLD.description) EXECUTE FUNCTION copy_changed_description();

CREATE OR REPLACE FUNCTION copy_new_descriptions() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO incident_texts (id, created_at, description)
    SELECT id, created_at, search_form(description)
      FROM new_incidents
        ON CONFLICT (id) DO UPDATE SET created_at = excluded.created_at, description = excluded.description;
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION copy_changed_description() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    UPDATE incident_texts
       SET description = search_form(NEW.description)
     WHERE id = NEW.id;
    RETURN NULL;
END
$$;

DROP FUNCTION merge_labels, changed_labels;

DROP INDEX incident_texts_labels_idx;

ALTER TABLE incident_texts DROP COLUMN labels;

ALTER TABLE incidents DROP COLUMN labels;

CREATE OR REPLACE FUNCTION incidents_between(since timestamptz, before_created_at timestamptz, before_id bigint)
    RETURNS SETOF incidents
    LANGUAGE sql STABLE PARALLEL SAFE
    BEGIN ATOMIC
    SELECT *
      FROM incidents
     WHERE created_at >= coalesce(since, '-infinity')
       AND (created_at, id) < (coalesce(before_created_at, 'infinity'), coalesce(before_id, 0));
    END;

-- An entry about a label breaks the old rule, which then holds only for new entries.
ALTER DOMAIN timeline_field DROP CONSTRAINT timeline_field_check;

ALTER DOMAIN timeline_field ADD CONSTRAINT timeline_field_check CHECK (VALUE IN ('description', 'source')) NOT VALID;

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM timeline WHERE kind = 'edited' AND field LIKE 'labels.%') THEN
        ALTER DOMAIN timeline_field VALIDATE CONSTRAINT timeline_field_check;
    END IF;
END
$$;
