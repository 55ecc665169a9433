-- What pg_dump 18 wrote of an empty database that the service of commit 5d17a7d had migrated, without
-- comments, settings and yoyo's log. test_upgrade.py lets the service take it over.
SELECT pg_catalog.set_config('search_path', '', false);
CREATE EXTENSION IF NOT EXISTS pg_trgm WITH SCHEMA public;
CREATE DOMAIN public.incident_source AS text
	CONSTRAINT incident_source_check CHECK ((VALUE = ANY (ARRAY['operator'::text, 'monitoring'::text, 'partner'::text])));
CREATE DOMAIN public.incident_status AS text
	CONSTRAINT incident_status_check CHECK ((VALUE = ANY (ARRAY['open'::text, 'in_progress'::text, 'resolved'::text, 'closed'::text])));
CREATE DOMAIN public.timeline_field AS text;
CREATE DOMAIN public.timeline_kind AS text
	CONSTRAINT timeline_kind_check CHECK ((VALUE = ANY (ARRAY['created'::text, 'status'::text, 'edited'::text, 'note'::text])));
CREATE DOMAIN public.timeline_note AS text
	CONSTRAINT timeline_note_check CHECK (((char_length(VALUE) >= 1) AND (char_length(VALUE) <= 5000)));
CREATE FUNCTION public.changed_labels(old_labels jsonb, new_labels jsonb) RETURNS TABLE(field text, from_value text, to_value text)
    LANGUAGE sql IMMUTABLE ROWS 2 PARALLEL SAFE
    BEGIN ATOMIC
 SELECT ('labels.'::text || name.name),
     (changed_labels.old_labels ->> name.name),
     (changed_labels.new_labels ->> name.name)
    FROM jsonb_object_keys((changed_labels.old_labels || changed_labels.new_labels)) name(name)
   WHERE ((changed_labels.old_labels -> name.name) IS DISTINCT FROM (changed_labels.new_labels -> name.name));
END;
CREATE FUNCTION public.choose_search(statuses text[], sources text[], since timestamp with time zone, before_created_at timestamp with time zone, before_id bigint, pattern text, has_accents boolean, label_filter jsonpath) RETURNS text
    LANGUAGE plpgsql STABLE PARALLEL SAFE
    AS $$
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
CREATE FUNCTION public.claim_idempotency_keys(actors text[], keys text[], digests bytea[], id_sequence regclass) RETURNS TABLE("position" bigint, made_id bigint, is_replay boolean, is_same_request boolean)
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
BEGIN
    IF array_remove(keys, NULL) = '{}' THEN
        RETURN;
    END IF;
    RETURN QUERY
      WITH claimed AS (
           INSERT INTO idempotency_keys AS existing (actor, key, digest, made_id)
           SELECT actor, key, digest, nextval(id_sequence)
             FROM unnest(actors, keys, digests) AS request (actor, key, digest)
            WHERE key IS NOT NULL
           ON CONFLICT (actor, key) DO UPDATE
              SET replays = existing.replays + (existing.digest = excluded.digest)::integer, used_at = now()
           RETURNING actor, key, digest, made_id, replays)
    SELECT request.position, claimed.made_id,
           claimed.replays > 0 OR claimed.digest <> request.digest,
           claimed.digest = request.digest
      FROM unnest(actors, keys, digests) WITH ORDINALITY AS request (actor, key, digest, position)
           JOIN claimed USING (actor, key);
    DELETE FROM idempotency_keys
     WHERE ctid = ANY (ARRAY(
           SELECT ctid
             FROM idempotency_keys
            WHERE used_at < now() - interval '7 days'
            ORDER BY used_at
            LIMIT 100
              FOR UPDATE SKIP LOCKED));
END
$$;
CREATE FUNCTION public.search_form(value text) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN CASE WHEN ((getdatabaseencoding() <> 'UTF8'::name) OR (value IS NFC NORMALIZED)) THEN value ELSE NORMALIZE(value) END;
CREATE FUNCTION public.contains_text(description text, pattern text, has_accents boolean) RETURNS boolean
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN ((has_accents OR (description ~~* pattern)) AND (public.search_form(description) ~~* pattern));
CREATE FUNCTION public.copy_changed_description() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    UPDATE incident_texts
       SET description = search_form(NEW.description), labels = NEW.labels
     WHERE id = NEW.id;
    RETURN NULL;
END
$$;
CREATE FUNCTION public.copy_new_descriptions() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    INSERT INTO incident_texts (id, created_at, description, labels)
    SELECT id, created_at, search_form(description), labels
      FROM new_incidents
        ON CONFLICT (id) DO UPDATE
       SET created_at = excluded.created_at, description = excluded.description, labels = excluded.labels;
    RETURN NULL;
END
$$;
CREATE FUNCTION public.rfc3339(value timestamp with time zone) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN (replace(((value AT TIME ZONE 'UTC'::text))::text, ' '::text, 'T'::text) || 'Z'::text);
CREATE TABLE public.incidents (
    id bigint NOT NULL,
    description text NOT NULL,
    status public.incident_status DEFAULT 'open'::text NOT NULL,
    source public.incident_source NOT NULL,
    version integer DEFAULT 1 NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    updated_at timestamp with time zone DEFAULT now() NOT NULL,
    noted_at timestamp with time zone,
    in_progress_at timestamp with time zone,
    resolved_at timestamp with time zone,
    labels jsonb DEFAULT '{}'::jsonb NOT NULL,
    CONSTRAINT incidents_description_check CHECK (((char_length(description) >= 1) AND (char_length(description) <= 5000)))
);
CREATE FUNCTION public.incident_csv(incident public.incidents) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN format('%s,"%s%s",%s,%s,%s,%s,%s,"%s"'::text, (incident).id, CASE WHEN ((incident).description ~ '^[=+@\t\r\n-]'::text) THEN ''''::text ELSE NULL::text END, replace((incident).description, '"'::text, '""'::text), (incident).status, (incident).source, public.rfc3339((incident).created_at), public.rfc3339((incident).updated_at), (incident).version, replace(((incident).labels)::text, '"'::text, '""'::text));
CREATE FUNCTION public.incident_json(incident public.incidents) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN (((((((((((((((('{"id":'::text || (incident).id) || ',"description":'::text) || (to_json((incident).description))::text) || ',"status":"'::text) || ((incident).status)::text) || '","source":"'::text) || ((incident).source)::text) || '","labels":'::text) || ((incident).labels)::text) || ',"created_at":"'::text) || public.rfc3339((incident).created_at)) || '","updated_at":"'::text) || public.rfc3339((incident).updated_at)) || '","version":'::text) || (incident).version) || '}'::text);
CREATE FUNCTION public.incident_line(incident public.incidents, format text) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN CASE format WHEN 'json'::text THEN public.incident_json(incident) WHEN 'ndjson'::text THEN (public.incident_json(incident) || '
'::text) ELSE (public.incident_csv(incident) || E'\r\n'::text) END;
CREATE FUNCTION public.incident_matches(incident public.incidents, statuses text[], sources text[], pattern text, has_accents boolean, label_filter jsonpath) RETURNS boolean
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN (((statuses IS NULL) OR ((((incident).status)::text = ANY (statuses)) AND (((incident).source)::text = ANY (sources)))) AND ((pattern IS NULL) OR public.contains_text((incident).description, pattern, has_accents)) AND ((label_filter IS NULL) OR ((incident).labels @@ label_filter)));
CREATE TABLE public.incident_texts (
    id bigint NOT NULL,
    created_at timestamp with time zone NOT NULL,
    description text NOT NULL,
    labels jsonb DEFAULT '{}'::jsonb NOT NULL
);
CREATE FUNCTION public.incident_texts_between(since timestamp with time zone, before_created_at timestamp with time zone, before_id bigint) RETURNS SETOF public.incident_texts
    LANGUAGE sql STABLE PARALLEL SAFE
    BEGIN ATOMIC
 SELECT incident_texts.id,
     incident_texts.created_at,
     incident_texts.description,
     incident_texts.labels
    FROM public.incident_texts
   WHERE ((incident_texts.created_at >= COALESCE(incident_texts_between.since, '-infinity'::timestamp with time zone)) AND (ROW(incident_texts.created_at, incident_texts.id) < ROW(COALESCE(incident_texts_between.before_created_at, 'infinity'::timestamp with time zone), COALESCE(incident_texts_between.before_id, (0)::bigint))));
END;
CREATE FUNCTION public.incidents_between(since timestamp with time zone, before_created_at timestamp with time zone, before_id bigint) RETURNS SETOF public.incidents
    LANGUAGE sql STABLE PARALLEL SAFE
    BEGIN ATOMIC
 SELECT incidents.id,
     incidents.description,
     incidents.status,
     incidents.source,
     incidents.version,
     incidents.created_at,
     incidents.updated_at,
     incidents.noted_at,
     incidents.in_progress_at,
     incidents.resolved_at,
     incidents.labels
    FROM public.incidents
   WHERE ((incidents.created_at >= COALESCE(incidents_between.since, '-infinity'::timestamp with time zone)) AND (ROW(incidents.created_at, incidents.id) < ROW(COALESCE(incidents_between.before_created_at, 'infinity'::timestamp with time zone), COALESCE(incidents_between.before_id, (0)::bigint))));
END;
CREATE FUNCTION public.merge_labels(labels jsonb, patch jsonb) RETURNS jsonb
    LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
    AS $$
DECLARE
    merged constant jsonb := jsonb_strip_nulls(labels || patch);
BEGIN
    IF (SELECT count(*) FROM jsonb_object_keys(merged)) > 32 THEN
        RAISE EXCEPTION 'an incident has at most 32 labels; remove some' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    RETURN merged;
END
$$;
CREATE FUNCTION public.refuse_timeline_change() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    RAISE EXCEPTION 'the timeline is append-only: % is refused; add a note instead', TG_OP;
END
$$;
CREATE FUNCTION public.set_first_times() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    IF NEW.status = 'in_progress' THEN
        NEW.in_progress_at := NEW.updated_at;
    ELSE
        NEW.resolved_at := NEW.updated_at;
    END IF;
    RETURN NEW;
END
$$;
CREATE TABLE public.timeline (
    id bigint NOT NULL,
    incident_id bigint NOT NULL,
    kind public.timeline_kind NOT NULL,
    field public.timeline_field,
    from_value text,
    to_value text,
    note public.timeline_note,
    actor text NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);
CREATE FUNCTION public.timeline_json(entry public.timeline) RETURNS json
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN json_strip_nulls(json_build_object('id', (entry).id, 'incident_id', (entry).incident_id, 'kind', (entry).kind, 'field', (entry).field, 'from', (entry).from_value, 'to', (entry).to_value, 'note', (entry).note, 'actor', (entry).actor, 'created_at', public.rfc3339((entry).created_at)));
CREATE FUNCTION public.timeline_line(entry public.timeline, incident text, format text) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN ((((CASE format WHEN 'sse'::text THEN (((('id: '::text || (entry).id) || '
event: '::text) || ((entry).kind)::text) || '
data: '::text) ELSE ''::text END || "left"((public.timeline_json(entry))::text, '-1'::integer)) || COALESCE(incident, ''::text)) || '}'::text) || CASE format WHEN 'sse'::text THEN '

'::text WHEN 'ndjson'::text THEN '
'::text ELSE ''::text END);
CREATE TABLE public._yoyo_log (
    id character varying(36) NOT NULL,
    migration_hash character varying(64),
    migration_id character varying(255),
    operation character varying(10),
    username character varying(255),
    hostname character varying(255),
    comment character varying(255),
    created_at_utc timestamp without time zone
);
CREATE TABLE public._yoyo_migration (
    migration_hash character varying(64) NOT NULL,
    migration_id character varying(255),
    applied_at_utc timestamp without time zone
);
CREATE TABLE public._yoyo_version (
    version integer NOT NULL,
    installed_at_utc timestamp without time zone
);
CREATE TABLE public.dedup_keys (
    key text NOT NULL,
    actor text NOT NULL,
    incident_id bigint NOT NULL,
    times integer DEFAULT 1 NOT NULL,
    last_seen_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT dedup_keys_key_check CHECK (((char_length(key) >= 1) AND (char_length(key) <= 255)))
);
CREATE TABLE public.idempotency_keys (
    actor text NOT NULL,
    key text NOT NULL,
    digest bytea NOT NULL,
    made_id bigint NOT NULL,
    replays integer DEFAULT 0 NOT NULL,
    used_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT idempotency_keys_key_check CHECK (((char_length(key) >= 1) AND (char_length(key) <= 255)))
);
ALTER TABLE public.incidents ALTER COLUMN id ADD GENERATED BY DEFAULT AS IDENTITY (
    SEQUENCE NAME public.incidents_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
ALTER TABLE public.timeline ALTER COLUMN id ADD GENERATED BY DEFAULT AS IDENTITY (
    SEQUENCE NAME public.timeline_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE TABLE public.yoyo_lock (
    locked integer DEFAULT 1 NOT NULL,
    ctime timestamp without time zone,
    pid integer NOT NULL
);
INSERT INTO public._yoyo_migration VALUES ('eefec4c0e496b45155056b84ce6d5cd0051acf3a9dd1942a4c4bbe8ab65ef651', '0000.set-aside-replaced-table', '2026-11-28');
INSERT INTO public._yoyo_migration VALUES ('86cf6e8c6754a2a37677db625a0b9e66e0234c76caa0cb481240ea25b91c2b60', '0001.schema', '2026-11-28');
INSERT INTO public._yoyo_migration VALUES ('2e2d7d85b19a729ed8a80ca80b4bf305a487d3999e2a622093b60438609f9d3a', '0002.take-over-replaced-incidents', '2026-11-28');
INSERT INTO public._yoyo_migration VALUES ('a4aedbd2d662872eadcbc5fd7b6bcef6a908bc1074eae7b6c886c18f6e70e4ac', '0003.add-first-times', '2026-11-28');
INSERT INTO public._yoyo_migration VALUES ('6f923a5910f89b621bb25c20f43331aebb513b771866420f087b5b9c87f9fbc9', '0004.fill-first-times', '2026-11-28');
INSERT INTO public._yoyo_migration VALUES ('8b36eca8dc4c15abf94e0873087b50e37bff5aea38c1df971b9b32313fe57cb6', '0005.serve-the-feed', '2026-11-28');
INSERT INTO public._yoyo_migration VALUES ('f082166f89969485caa189878593794d0efaa00d7af4e21de928e2b1fe8f0732', '0006.add-labels', '2026-11-28');
INSERT INTO public._yoyo_migration VALUES ('da8cf99cfa0db2db82e21d3239df766226529846282b1786f74510918bedefd1', '0007.add-dedup-keys', '2026-11-28');
INSERT INTO public._yoyo_version VALUES (2, '2026-11-28');
SELECT pg_catalog.setval('public.incidents_id_seq', 1, false);
SELECT pg_catalog.setval('public.timeline_id_seq', 1, false);
ALTER TABLE ONLY public._yoyo_log
    ADD CONSTRAINT _yoyo_log_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public._yoyo_migration
    ADD CONSTRAINT _yoyo_migration_pkey PRIMARY KEY (migration_hash);
ALTER TABLE ONLY public._yoyo_version
    ADD CONSTRAINT _yoyo_version_pkey PRIMARY KEY (version);
ALTER TABLE ONLY public.dedup_keys
    ADD CONSTRAINT dedup_keys_pkey PRIMARY KEY (key, actor);
ALTER TABLE ONLY public.idempotency_keys
    ADD CONSTRAINT idempotency_keys_pkey PRIMARY KEY (actor, key);
ALTER TABLE ONLY public.incident_texts
    ADD CONSTRAINT incident_texts_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.incidents
    ADD CONSTRAINT incidents_pkey PRIMARY KEY (id);
ALTER DOMAIN public.timeline_field
    ADD CONSTRAINT timeline_field_check CHECK (((VALUE = ANY (ARRAY['description'::text, 'source'::text])) OR (VALUE ~~ 'labels.%'::text))) NOT VALID;
ALTER TABLE ONLY public.timeline
    ADD CONSTRAINT timeline_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.yoyo_lock
    ADD CONSTRAINT yoyo_lock_pkey PRIMARY KEY (locked);
CREATE INDEX dedup_keys_incident_id_idx ON public.dedup_keys USING btree (incident_id);
CREATE INDEX idempotency_keys_used_at_idx ON public.idempotency_keys USING btree (used_at);
CREATE INDEX incident_texts_description_idx ON public.incident_texts USING gin (description public.gin_trgm_ops) WITH (gin_pending_list_limit='256');
CREATE INDEX incident_texts_labels_idx ON public.incident_texts USING gin (labels jsonb_path_ops) WITH (gin_pending_list_limit='256') WHERE (labels <> '{}'::jsonb);
CREATE INDEX incidents_created_at_idx ON public.incidents USING btree (created_at, id);
CREATE INDEX incidents_status_source_created_at_idx ON public.incidents USING btree (status, source, created_at, id);
CREATE INDEX timeline_incident_id_idx ON public.timeline USING btree (incident_id, id);
CREATE INDEX timeline_kind_id_idx ON public.timeline USING btree (kind, id) WHERE ((kind)::text <> 'created'::text);
CREATE TRIGGER incidents_copy_changed_description AFTER UPDATE ON public.incidents FOR EACH ROW WHEN (((new.description <> old.description) OR (new.labels <> old.labels))) EXECUTE FUNCTION public.copy_changed_description();
CREATE TRIGGER incidents_copy_new_descriptions AFTER INSERT ON public.incidents REFERENCING NEW TABLE AS new_incidents FOR EACH STATEMENT EXECUTE FUNCTION public.copy_new_descriptions();
CREATE TRIGGER incidents_set_first_times BEFORE UPDATE ON public.incidents FOR EACH ROW WHEN ((((new.status)::text <> (old.status)::text) AND ((((new.status)::text = 'in_progress'::text) AND (new.in_progress_at IS NULL)) OR (((new.status)::text = 'resolved'::text) AND (new.resolved_at IS NULL))))) EXECUTE FUNCTION public.set_first_times();
CREATE TRIGGER timeline_append_only BEFORE DELETE OR UPDATE OR TRUNCATE ON public.timeline FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_timeline_change();
ALTER TABLE ONLY public.dedup_keys
    ADD CONSTRAINT dedup_keys_incident_id_fkey FOREIGN KEY (incident_id) REFERENCES public.incidents(id) ON DELETE CASCADE;
