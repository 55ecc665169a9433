-- depends: 0005.serve-the-feed
-- transactional: false
--
-- Labels of incidents: names and values, for example severity and critical. Every statement may be run twice,
-- because one that waits too long for a table ends this migration, which is then run again. It is not one
-- transaction: a search locks both tables too, perhaps in the other order, and the two would deadlock.

-- One statement, because a function that returns incidents fails while the table has a column that it lacks. (The
-- text is that of 0003; its * stands for the columns that the table had then.) This statement comes first, because
-- every ALTER TABLE makes PostgreSQL plan searches again, and a search that is planned while this one commits fails.
DO $do$
BEGIN
    ALTER TABLE incidents ADD COLUMN IF NOT EXISTS labels jsonb NOT NULL DEFAULT '{}';

    CREATE OR REPLACE FUNCTION incidents_between(since timestamptz, before_created_at timestamptz, before_id bigint)
        RETURNS SETOF incidents
        LANGUAGE sql STABLE PARALLEL SAFE
        BEGIN ATOMIC
        SELECT *
          FROM incidents
         WHERE created_at >= coalesce(since, '-infinity')
           AND (created_at, id) < (coalesce(before_created_at, 'infinity'), coalesce(before_id, 0));
        END;
END
$do$;

-- A copy of the labels to search in, beside the copy of the description and for the same reason: a change of status
-- does not write to the index here.
ALTER TABLE incident_texts ADD COLUMN IF NOT EXISTS labels jsonb NOT NULL DEFAULT '{}';

-- For incident_search.sql. Incidents without labels are not in it, so reporting one does not become slower. When
-- CONCURRENTLY fails, it leaves an invalid index.
DROP INDEX CONCURRENTLY IF EXISTS incident_texts_labels_idx;

CREATE INDEX CONCURRENTLY incident_texts_labels_idx ON incident_texts
    USING gin (labels jsonb_path_ops) WITH (gin_pending_list_limit = 256) WHERE labels <> '{}';

-- The timeline names a label that was changed as 'labels.severity'. NOT VALID: the entries that are there
-- have passed a stricter rule, so the table need not be read.
ALTER DOMAIN timeline_field DROP CONSTRAINT IF EXISTS timeline_field_check;

ALTER DOMAIN timeline_field ADD CONSTRAINT timeline_field_check
    CHECK (VALUE IN ('description', 'source') OR VALUE LIKE 'labels.%') NOT VALID;

-- ── Changing labels ──────────────────────────────────────────────────────────────────────────────

-- Change labels by a JSON merge patch (RFC 7396): null removes a label. Null when one of the two is null.
-- SQLSTATE 22023 when there would be too many.
CREATE OR REPLACE FUNCTION merge_labels(labels jsonb, patch jsonb) RETURNS jsonb
    LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
DECLARE
    merged constant jsonb := jsonb_strip_nulls(labels || patch);
BEGIN
    IF (SELECT count(*) FROM jsonb_object_keys(merged)) > 32 THEN
        RAISE EXCEPTION 'an incident has at most 32 labels; remove some' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    RETURN merged;
END
$$;

-- The labels that differ, as fields of the timeline. A value is null where there is no such label.
CREATE OR REPLACE FUNCTION changed_labels(old_labels jsonb, new_labels jsonb)
    RETURNS TABLE (field text, from_value text, to_value text)
    LANGUAGE sql IMMUTABLE PARALLEL SAFE ROWS 2
    BEGIN ATOMIC
    SELECT 'labels.' || name, old_labels ->> name, new_labels ->> name
      FROM jsonb_object_keys(old_labels || new_labels) AS name
     WHERE old_labels -> name IS DISTINCT FROM new_labels -> name;
    END;

-- ── The copies to search in ──────────────────────────────────────────────────────────────────────
-- The names of these functions are from before there were labels.

CREATE OR REPLACE FUNCTION copy_new_descriptions() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO incident_texts (id, created_at, description, labels)
    SELECT id, created_at, search_form(description), labels
      FROM new_incidents
        ON CONFLICT (id) DO UPDATE
       SET created_at = excluded.created_at, description = excluded.description, labels = excluded.labels;
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION copy_changed_description() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    UPDATE incident_texts
       SET description = search_form(NEW.description), labels = NEW.labels
     WHERE id = NEW.id;
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER incidents_copy_changed_description
    AFTER UPDATE ON incidents
    FOR EACH ROW WHEN (NEW.description <> OLD.description OR NEW.labels <> OLD.labels)
    EXECUTE FUNCTION copy_changed_description();

-- ── Reading the list ─────────────────────────────────────────────────────────────────────────────

-- Like incidents_between(), for the copies to search in.
CREATE OR REPLACE FUNCTION incident_texts_between(since timestamptz, before_created_at timestamptz, before_id bigint)
    RETURNS SETOF incident_texts
    LANGUAGE sql STABLE PARALLEL SAFE
    BEGIN ATOMIC
    SELECT *
      FROM incident_texts
     WHERE created_at >= coalesce(since, '-infinity')
       AND (created_at, id) < (coalesce(before_created_at, 'infinity'), coalesce(before_id, 0));
    END;

-- Whether an incident passes the filters of a list; null stands for a filter that is not given.
CREATE OR REPLACE FUNCTION incident_matches(
    incident incidents, statuses text[], sources text[], pattern text, has_accents boolean, label_filter jsonpath)
    RETURNS boolean
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT (statuses IS NULL OR (incident).status = ANY (statuses) AND (incident).source = ANY (sources))
       AND (pattern IS NULL OR contains_text((incident).description, pattern, has_accents))
       AND (label_filter IS NULL OR (incident).labels @@ label_filter);
$$;

-- How incident_search.sql should look for incidents. This counts how many of the newest 1,000 between the bounds pass
-- each filter. Ten that pass fill a page of 50 within 5,000. A text of one or two letters ('%ab%') has no trigram, so
-- PostgreSQL would read the whole index, and cannot be cancelled meanwhile. ('%a b%' has some.)
--   'list'    read the list from its newest incident: many pass, there are under 1,000, or no index helps
--   'chosen'  the same for each chosen status and source by itself: these are rare, and the other filters let many pass
--   'texts'   use the index of texts: few incidents have the text
--   'labels'  use the index of labels: few incidents have the labels
-- In PL/pgSQL, because a session keeps its plan; an SQL function is planned again for each statement.
CREATE OR REPLACE FUNCTION choose_search(
    statuses text[], sources text[], since timestamptz, before_created_at timestamptz, before_id bigint,
    pattern text, has_accents boolean, label_filter jsonpath)
    RETURNS text
    LANGUAGE plpgsql STABLE PARALLEL SAFE AS $$
DECLARE
    -- Null when there is no pattern.
    is_short constant boolean := pattern !~ '[[:alnum:]]{3}|[^[:alnum:]%_\\][[:alnum:]]';
    sampled bigint;
    chosen_hits bigint;
    hits bigint;
    text_hits bigint;
    label_hits bigint;
BEGIN
    SELECT count(*), count(*) FILTER (WHERE has_text AND has_labels AND is_chosen),
           count(*) FILTER (WHERE has_text AND has_labels),
           count(*) FILTER (WHERE has_text), count(*) FILTER (WHERE has_labels)
      INTO sampled, chosen_hits, hits, text_hits, label_hits
      FROM (SELECT incident_matches(incident, statuses, sources, NULL, NULL, NULL) AS is_chosen,
                   incident_matches(incident, NULL, NULL, pattern, has_accents, NULL) AS has_text,
                   incident_matches(incident, NULL, NULL, NULL, NULL, label_filter) AS has_labels
              FROM incidents_between(since, before_created_at, before_id) AS incident
             ORDER BY created_at DESC, id DESC
             LIMIT 1000) AS newest;
    RETURN CASE WHEN sampled < 1000 OR chosen_hits >= 10 THEN 'list'
                WHEN hits >= 10 THEN 'chosen'
                WHEN is_short AND label_hits >= 100 THEN CASE WHEN statuses IS NULL THEN 'list' ELSE 'chosen' END
                WHEN text_hits < label_hits AND is_short IS NOT TRUE THEN 'texts'
                ELSE 'labels' END;
END
$$;

-- ── Rows as text ─────────────────────────────────────────────────────────────────────────────────

CREATE OR REPLACE FUNCTION incident_json(incident incidents) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT '{"id":' || (incident).id || ',"description":' || to_json((incident).description)::text
        || ',"status":"' || (incident).status || '","source":"' || (incident).source
        || '","labels":' || (incident).labels::text
        || ',"created_at":"' || rfc3339((incident).created_at)
        || '","updated_at":"' || rfc3339((incident).updated_at)
        || '","version":' || (incident).version || '}';
$$;

-- labels is the last column, so that programs that count columns still find the others.
CREATE OR REPLACE FUNCTION incident_csv(incident incidents) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT format(
        '%s,"%s%s",%s,%s,%s,%s,%s,"%s"',
        (incident).id, CASE WHEN (incident).description ~ '^[=+@\t\r\n-]' THEN '''' END,
        replace((incident).description, '"', '""'), (incident).status, (incident).source,
        rfc3339((incident).created_at), rfc3339((incident).updated_at), (incident).version,
        replace((incident).labels::text, '"', '""'));
$$;
