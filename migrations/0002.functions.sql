-- depends: 0001.schema
-- The functions and triggers. PostgreSQL inlines a simple SQL function, so that its conditions can
-- use indexes. The body of one that takes a row of a table must be
-- between $$: with RETURN instead, PostgreSQL's releases since autumn 2026 refuse to add a column
-- with a default to that table.
SET lock_timeout = '3s';
-- Dropping the functions of the previous version also drops its triggers. This locks incidents
-- before timeline, as the writes of the service do: the other order could end in a deadlock.
DROP FUNCTION IF EXISTS copy_new_descriptions, copy_changed_description CASCADE;

-- A timestamp as RFC 3339 in UTC. It differs from PostgreSQL's own text only by the T and the Z
-- (the service sets DateStyle to ISO). to_char() would make a page a sixth slower.
CREATE OR REPLACE FUNCTION rfc3339(value timestamptz) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN replace((value AT TIME ZONE 'UTC')::text, ' ', 'T') || 'Z';

-- An incident as JSON. Joining strings takes half the time of json_build_object(), and this is most
-- of what a page costs. status and source need no escaping, because their domains allow only words.
CREATE OR REPLACE FUNCTION incident_json(incident incidents) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT '{"id":' || (incident).id || ',"description":' || to_json((incident).description)::text
        || ',"status":"' || (incident).status || '","source":"' || (incident).source
        || '","labels":' || (incident).labels::text
        || ',"created_at":"' || rfc3339((incident).created_at)
        || '","updated_at":"' || rfc3339((incident).updated_at)
        || '","version":' || (incident).version || '}'
$$;

-- An incident as a record of CSV (RFC 4180), without a line end. An apostrophe keeps spreadsheets
-- from running a description that begins with =, +, -, @, a tab or a line break as a formula.
CREATE OR REPLACE FUNCTION incident_csv(incident incidents) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT format('%s,"%s%s",%s,%s,%s,%s,%s,"%s"',
        (incident).id, CASE WHEN (incident).description ~ '^[=+@\t\r\n-]' THEN '''' END,
        replace((incident).description, '"', '""'), (incident).status, (incident).source,
        rfc3339((incident).created_at), rfc3339((incident).updated_at), (incident).version,
        replace((incident).labels::text, '"', '""'))
$$;

-- An incident as one line of a list in this format: 'json', 'ndjson' or 'csv'.
CREATE OR REPLACE FUNCTION incident_line(incident incidents, format text) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT CASE format WHEN 'json' THEN incident_json(incident)
                       WHEN 'ndjson' THEN incident_json(incident) || E'\n'
                       ELSE incident_csv(incident) || E'\r\n' END
$$;

-- A timeline entry as JSON. What does not apply to its kind is left out.
CREATE OR REPLACE FUNCTION timeline_json(entry timeline) RETURNS json
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT json_strip_nulls(json_build_object(
        'id', (entry).id, 'incident_id', (entry).incident_id, 'kind', (entry).kind,
        'field', (entry).field, 'from', (entry).from_value, 'to', (entry).to_value,
        'note', (entry).note, 'actor', (entry).actor, 'created_at', rfc3339((entry).created_at)))
$$;

-- An entry as one line of a page: 'json', 'ndjson', or 'sse' (Server-Sent Events, HTML standard,
-- 9.2). incident is a field to add before the last brace, with its comma in front, or null.
CREATE OR REPLACE FUNCTION timeline_line(entry timeline, incident text, format text) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT CASE format WHEN 'sse' THEN E'id: ' || (entry).id || E'\nevent: ' || (entry).kind
                                       || E'\ndata: ' ELSE '' END
        || left(timeline_json(entry)::text, -1) || coalesce(incident, '') || '}'
        || CASE format WHEN 'sse' THEN E'\n\n' WHEN 'ndjson' THEN E'\n' ELSE '' END
$$;

-- The lines of a page as one body. For JSON: the elements of an array, without its brackets.
CREATE OR REPLACE FUNCTION join_lines(lines text[], format text) RETURNS bytea
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN convert_to(coalesce(
        array_to_string(lines, CASE format WHEN 'json' THEN E',\n' ELSE '' END), ''), 'UTF8');

-- True on a primary. On a standby, it raises what a write would raise.
CREATE OR REPLACE FUNCTION require_primary() RETURNS boolean LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF pg_is_in_recovery() THEN
        RAISE read_only_sql_transaction
            USING MESSAGE = 'only a primary knows the order of all entries; this is a standby';
    END IF;
    RETURN true;
END
$$;

-- Incidents created at or after `since` and listed after a given place (created_at, id); null means
-- no bound.
CREATE OR REPLACE FUNCTION incidents_between(
    since timestamptz, before_created_at timestamptz, before_id bigint)
    RETURNS SETOF incidents LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT * FROM incidents
     WHERE created_at >= coalesce(since, '-infinity')
       AND (created_at, id) < (coalesce(before_created_at, 'infinity'), coalesce(before_id, 0))
$$;

-- Like incidents_between(), for one status and source. Row comparisons fit only the index that
-- starts with (status, source); with =, PostgreSQL might choose that of the creation times.
CREATE OR REPLACE FUNCTION incidents_of(
    a_status text, a_source text, since timestamptz, before_created_at timestamptz,
    before_id bigint) RETURNS SETOF incidents LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT * FROM incidents
     WHERE (status, source, created_at) >= (a_status, a_source, coalesce(since, '-infinity'))
       AND (status, source, created_at, id)
           < (a_status, a_source, coalesce(before_created_at, 'infinity'), coalesce(before_id, 0))
$$;

-- Like incidents_between(), for the copies to search in. Only processes of the previous version use
-- this, until they are replaced.
CREATE OR REPLACE FUNCTION incident_texts_between(
    since timestamptz, before_created_at timestamptz, before_id bigint)
    RETURNS SETOF incident_texts LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT * FROM incident_texts
     WHERE created_at >= coalesce(since, '-infinity')
       AND (created_at, id) < (coalesce(before_created_at, 'infinity'), coalesce(before_id, 0))
$$;

-- The form in which texts are compared (Unicode's NFC, which most texts have): a letter with an
-- accent is one character. A database with another encoding than UTF-8 cannot normalize.
CREATE OR REPLACE FUNCTION search_form(value text) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN CASE WHEN getdatabaseencoding() <> 'UTF8' OR value IS NFC NORMALIZED THEN value
                ELSE normalize(value) END;

-- Whether a description contains a text (a pattern of ILIKE). The second comparison decides. The
-- first avoids most calls of search_form(); it is skipped for accents, where it could miss matches.
CREATE OR REPLACE FUNCTION contains_text(description text, pattern text, has_accents boolean)
    RETURNS boolean LANGUAGE sql STABLE PARALLEL SAFE
    RETURN (has_accents OR description ILIKE pattern) AND search_form(description) ILIKE pattern;

-- Whether an incident passes the filters of a list; null stands for one that is not given.
CREATE OR REPLACE FUNCTION incident_matches(
    incident incidents, statuses text[], sources text[], pattern text, has_accents boolean,
    label_filter jsonpath) RETURNS boolean LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT (statuses IS NULL
            OR (incident).status = ANY (statuses) AND (incident).source = ANY (sources))
       AND (pattern IS NULL OR contains_text((incident).description, pattern, has_accents))
       AND (label_filter IS NULL OR (incident).labels @@ label_filter)
$$;

-- Choose how incident_search.sql looks for incidents, by counting how many of a sample pass each
-- filter. The sample is the 1,001st to the 2,000th newest within the bounds; newer ones may be a
-- burst of one problem. If ten of them pass, a page of 50 is full after about 5,000.
--   'list'       read the list from its newest incident: many pass, it is short, or no index helps
--   'by_status'  read the lists of the wanted statuses and sources: few incidents have these, but
--                many of those pass the other filters
--   'texts'      use the index of texts: few incidents have the text
--   'labels'     use the index of labels: few incidents have the labels
-- In PL/pgSQL, because a session keeps its plan. Before PostgreSQL 18, an SQL function is planned
-- for each statement.
CREATE OR REPLACE FUNCTION choose_search(
    statuses text[], sources text[], since timestamptz, before_created_at timestamptz,
    before_id bigint, pattern text, has_accents boolean, label_filter jsonpath)
    RETURNS text LANGUAGE plpgsql STABLE PARALLEL SAFE AS $$
DECLARE
    -- Whether the index cannot help: a text of one or two letters ('%ab%', but not '%a b%') has no
    -- trigram. PostgreSQL would read the whole index, and cannot be cancelled meanwhile. It is null
    -- when there is no pattern.
    is_short constant boolean := pattern !~ '[[:alnum:]]{3}|[^[:alnum:]%_\\][[:alnum:]]'
        OR show_trgm(pattern) = '{}'; -- as of Cyrillic letters where LC_CTYPE is C
    hits record;
BEGIN
    SELECT count(*) AS counted, count(*) FILTER (WHERE has_text) AS with_text,
           count(*) FILTER (WHERE has_labels) AS with_labels,
           count(*) FILTER (WHERE has_text AND has_labels) AS with_both,
           count(*) FILTER (WHERE has_text AND has_labels AND has_status) AS with_all
      INTO hits
      FROM (SELECT incident_matches(incident, statuses, sources, NULL, NULL, NULL) AS has_status,
                   incident_matches(incident, NULL, NULL, pattern, has_accents, NULL) AS has_text,
                   incident_matches(incident, NULL, NULL, NULL, NULL, label_filter) AS has_labels
              FROM (SELECT incident
                      FROM incidents_between(since, before_created_at, before_id) AS incident
                     ORDER BY created_at DESC, id DESC
                    OFFSET 1000 LIMIT 1000) AS sample) AS matches;
    RETURN CASE WHEN hits.counted < 1000 OR hits.with_all >= 10 THEN 'list'
                -- No index has a short text. If the labels are frequent too, none helps.
                WHEN hits.with_both >= 10 OR is_short AND hits.with_labels >= 100
                THEN CASE WHEN statuses IS NULL THEN 'list' ELSE 'by_status' END
                WHEN hits.with_text < hits.with_labels AND is_short IS NOT TRUE THEN 'texts'
                ELSE 'labels' END;
END
$$;

-- Apply a JSON merge patch (RFC 7396: null removes a label). SQLSTATE 22023 if over 32 are left.
CREATE OR REPLACE FUNCTION merge_labels(labels jsonb, patch jsonb)
    RETURNS jsonb LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
BEGIN
    labels := jsonb_strip_nulls(labels || patch);
    IF (SELECT count(*) FROM jsonb_object_keys(labels)) > 32 THEN
        RAISE invalid_parameter_value
            USING MESSAGE = 'an incident has at most 32 labels; remove some';
    END IF;
    RETURN labels;
END
$$;

-- Apply to the labels of an incident what its sender changed from its previous to its current
-- labels. A label that the sender repeats stays as the incident has it. One that the sender has
-- dropped goes, unless a person has changed it since. If there are over 32, new ones are left out.
CREATE OR REPLACE FUNCTION follow_sender(labels jsonb, previous jsonb, current jsonb) RETURNS jsonb
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT coalesce(jsonb_object_agg(name, value), '{}')
      FROM (SELECT name, value
              FROM jsonb_object_keys(labels || current) AS name
                   CROSS JOIN LATERAL (
                   SELECT CASE WHEN current -> name IS NOT DISTINCT FROM previous -> name
                               THEN labels ->> name
                               ELSE coalesce(current ->> name,
                                             nullif(labels ->> name, previous ->> name))
                          END AS value) AS new
             WHERE value IS NOT NULL
             ORDER BY labels ? name DESC, name
             LIMIT 32) AS followed
$$;

-- The labels that differ, as fields of the timeline. A value is null where there is no such label.
CREATE OR REPLACE FUNCTION changed_labels(old_labels jsonb, new_labels jsonb)
    RETURNS TABLE (field text, from_value text, to_value text)
    LANGUAGE sql IMMUTABLE PARALLEL SAFE ROWS 2 AS $$
    SELECT 'labels.' || name, old_labels ->> name, new_labels ->> name
      FROM jsonb_object_keys(old_labels || new_labels) AS name
     WHERE old_labels -> name IS DISTINCT FROM new_labels -> name
$$;

-- Claim idempotency keys. Each array has one element for each request; a null key is passed over.
-- Returns a row for each key: the position of its request, the id that the request makes or has
-- made, whether the key was used before, and whether it was used with this same request.
CREATE OR REPLACE FUNCTION claim_idempotency_keys(
    actors text[], keys text[], digests bytea[], id_sequence regclass)
    RETURNS TABLE ("position" bigint, made_id bigint, is_replay boolean, is_same_request boolean)
    LANGUAGE plpgsql AS $$
BEGIN
    IF array_remove(keys, NULL) = '{}' THEN
        RETURN;
    END IF;
    -- DO UPDATE, not DO NOTHING: PostgreSQL returns a conflicting row only when it is updated, and
    -- the update also waits until the other transaction with this key has ended.
    RETURN QUERY
      WITH claimed AS (
           INSERT INTO idempotency_keys AS existing (actor, key, digest, made_id)
           SELECT actor, key, digest, nextval(id_sequence)
             FROM unnest(actors, keys, digests) AS request (actor, key, digest)
            WHERE key IS NOT NULL
            ORDER BY key, actor -- so that two transactions cannot wait for each other
           ON CONFLICT (actor, key) DO UPDATE SET used_at = now(),
              replays = existing.replays + (existing.digest = excluded.digest)::integer
           RETURNING existing.*)
    SELECT request.position, claimed.made_id,
           -- A new row has no replays and this digest. An old one was just counted, or has another.
           claimed.replays > 0 OR claimed.digest <> request.digest,
           claimed.digest = request.digest
      FROM unnest(actors, keys, digests) WITH ORDINALITY AS request (actor, key, digest, position)
           JOIN claimed USING (actor, key);
    -- Last, and passing over locked keys, so that two claims cannot wait for each other.
    DELETE FROM idempotency_keys
     WHERE ctid = ANY (ARRAY(
           SELECT ctid FROM idempotency_keys
            WHERE used_at < now() - interval '7 days'
            ORDER BY used_at LIMIT 100 FOR UPDATE SKIP LOCKED));
END
$$;

-- Record when an incident is first in progress, and first resolved.
CREATE OR REPLACE FUNCTION set_first_times() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.status = 'in_progress' THEN
        NEW.in_progress_at := coalesce(NEW.in_progress_at, NEW.updated_at);
    ELSE
        NEW.resolved_at := coalesce(NEW.resolved_at, NEW.updated_at);
    END IF;
    RETURN NEW;
END
$$;
CREATE OR REPLACE TRIGGER incidents_set_first_times BEFORE UPDATE ON incidents
    FOR EACH ROW WHEN (NEW.status <> OLD.status AND NEW.status IN ('in_progress', 'resolved'))
    EXECUTE FUNCTION set_first_times();

-- Copy new texts. A copy may be left from an incident that somebody has deleted by hand.
CREATE OR REPLACE FUNCTION copy_new_texts() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO incident_texts (id, created_at, description, labels)
    SELECT id, created_at, search_form(description), labels FROM new_incidents
        ON CONFLICT (id) DO UPDATE SET created_at = excluded.created_at,
           description = excluded.description, labels = excluded.labels;
    RETURN NULL;
END
$$;
CREATE OR REPLACE TRIGGER incidents_copy_new_texts AFTER INSERT ON incidents
    REFERENCING NEW TABLE AS new_incidents FOR EACH STATEMENT EXECUTE FUNCTION copy_new_texts();

-- Copy a changed text. The condition keeps a change of status from paying for a function call.
CREATE OR REPLACE FUNCTION copy_changed_text() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE incident_texts
       SET description = search_form(NEW.description), labels = NEW.labels
     WHERE id = NEW.id;
    RETURN NULL;
END
$$;
CREATE OR REPLACE TRIGGER incidents_copy_changed_text AFTER UPDATE ON incidents
    FOR EACH ROW WHEN (NEW.description <> OLD.description OR NEW.labels <> OLD.labels)
    EXECUTE FUNCTION copy_changed_text();

-- Keep the timeline as it was written, even from someone using psql with the service's own role.
CREATE OR REPLACE FUNCTION refuse_timeline_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the timeline is append-only: % is refused; add a note instead', TG_OP;
END
$$;
CREATE OR REPLACE TRIGGER timeline_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON timeline
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_timeline_change();
