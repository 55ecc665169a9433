CREATE OR REPLACE FUNCTION incident_json(incident incidents) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN format(
        '{"id":%s,"description":%s,"status":"%s","source":"%s","created_at":"%s","updated_at":"%s","version":%s}',
        (incident).id, to_json((incident).description), (incident).status, (incident).source,
        rfc3339((incident).created_at), rfc3339((incident).updated_at), (incident).version);

CREATE OR REPLACE FUNCTION rfc3339(moment timestamptz) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN trim(to_json(moment AT TIME ZONE 'UTC')::text, '"') || 'Z';
