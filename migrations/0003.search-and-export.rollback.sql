DROP FUNCTION IF EXISTS cursor_id(text);

DROP FUNCTION IF EXISTS cursor_after(bigint);

DROP FUNCTION IF EXISTS list_part(text, text, boolean, boolean);

DROP FUNCTION IF EXISTS incident_line(incidents, text);

DROP FUNCTION IF EXISTS incident_csv(incidents);

DROP INDEX IF EXISTS incidents_description_idx;

DROP EXTENSION IF EXISTS pg_trgm;
