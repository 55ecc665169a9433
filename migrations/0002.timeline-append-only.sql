-- depends: 0001.incidents
-- What happened stays as it was written, also for someone with psql and the service's own role.
CREATE OR REPLACE FUNCTION timeline_is_append_only() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the timeline is append-only: % is refused; add a note instead', TG_OP;
END
$$;

CREATE OR REPLACE TRIGGER timeline_append_only
    BEFORE UPDATE OR DELETE OR TRUNCATE ON timeline
    FOR EACH STATEMENT EXECUTE FUNCTION timeline_is_append_only();

-- A timeline entry as every route answers it: what does not apply to its kind is left out.
CREATE OR REPLACE FUNCTION timeline_json(entry timeline) RETURNS json
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN json_strip_nulls(json_build_object(
        'id', (entry).id, 'incident_id', (entry).incident_id, 'kind', (entry).kind,
        'field', (entry).field, 'from', (entry).from_value, 'to', (entry).to_value,
        'note', (entry).note, 'actor', (entry).actor, 'created_at', rfc3339((entry).created_at)));
