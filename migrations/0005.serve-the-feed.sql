-- depends: 0004.fill-first-times
-- transactional: false
--
-- For timeline_page.sql, which also uses timeline_incident_id_idx of 0001: the entries of one kind, oldest
-- first. Most entries are of the kind 'created', so a page of those is quick without an index. They are left
-- out, so that it does not become slower to report an incident. CONCURRENTLY, because other processes write
-- entries meanwhile; when it fails, it leaves an invalid index.
DROP INDEX CONCURRENTLY IF EXISTS timeline_kind_id_idx;

CREATE INDEX CONCURRENTLY timeline_kind_id_idx ON timeline (kind, id) WHERE kind <> 'created';

-- An entry as one line of a page in this format: 'json', 'ndjson', or 'sse', which is an event of Server-Sent
-- Events (HTML standard, 9.2). incident is a field to add, with its comma in front, or null.
CREATE OR REPLACE FUNCTION timeline_line(entry timeline, incident text, format text) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT CASE format WHEN 'sse' THEN E'id: ' || (entry).id || E'\nevent: ' || (entry).kind || E'\ndata: ' ELSE '' END
        || left(timeline_json(entry)::text, -1) || coalesce(incident, '') || '}'
        || CASE format WHEN 'sse' THEN E'\n\n' WHEN 'ndjson' THEN E'\n' ELSE '' END;
$$;
