-- depends: 0002.timeline-append-only
-- Parts of words in any case and alphabet, from three characters on (incident_search.sql). New rows
-- wait in a pending list that every search reads through: it is kept short, 256 KiB or 32 pages.
CREATE EXTENSION IF NOT EXISTS pg_trgm;

CREATE INDEX IF NOT EXISTS incidents_description_idx
    ON incidents USING gin (description gin_trgm_ops) WITH (gin_pending_list_limit = 256);

-- An incident as a record of CSV (RFC 4180). An apostrophe before =, +, -, @, a tab or a line break
-- keeps a spreadsheet from taking a description for a formula.
CREATE OR REPLACE FUNCTION incident_csv(incident incidents) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN format(
        E'%s,"%s%s",%s,%s,%s,%s,%s\r\n',
        (incident).id, CASE WHEN (incident).description ~ '^[=+@\t\r\n-]' THEN '''' END,
        replace((incident).description, '"', '""'), (incident).status, (incident).source,
        rfc3339((incident).created_at), rfc3339((incident).updated_at), (incident).version);

-- An incident as a line of a list in one of its forms: json, ndjson or csv.
CREATE OR REPLACE FUNCTION incident_line(incident incidents, form text) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN CASE form WHEN 'json' THEN incident_json(incident)
                     WHEN 'ndjson' THEN incident_json(incident) || E'\n'
                     ELSE incident_csv(incident) END;

-- A part of a list, as bytes: what stands before its lines and after them. A spreadsheet takes a CSV
-- file for UTF-8 by the byte order mark.
CREATE OR REPLACE FUNCTION list_part(form text, lines text, opens boolean, closes boolean) RETURNS bytea
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN convert_to(
        CASE WHEN opens AND form = 'json' THEN '['
             WHEN opens AND form = 'csv'
                  THEN E'\uFEFFid,description,status,source,created_at,updated_at,version\r\n'
             WHEN NOT opens AND form = 'json' AND lines <> '' THEN E',\n'
             ELSE '' END
        || lines || CASE WHEN closes AND form = 'json' THEN ']' ELSE '' END, 'UTF8');

-- The place after an incident in a list, with a checksum by which a broken one is known.
CREATE OR REPLACE FUNCTION cursor_after(id bigint) RETURNS text
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
    RETURN id || '-' || left(md5(id::text), 8);

-- The id of the incident that a cursor stands after; an error when it is no cursor.
CREATE OR REPLACE FUNCTION cursor_id(after text) RETURNS bigint
    LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
BEGIN
    IF after ~ '^[1-9][0-9]{0,17}-' AND after = cursor_after(split_part(after, '-', 1)::bigint) THEN
        RETURN split_part(after, '-', 1)::bigint;
    END IF;
    RAISE invalid_parameter_value
        USING MESSAGE = 'after is not a cursor; take it as it is from the Link header of a page';
END
$$;
