CREATE INDEX IF NOT EXISTS incidents_description_idx
    ON incidents USING gin (description gin_trgm_ops) WITH (gin_pending_list_limit = 256);

DROP TRIGGER IF EXISTS incident_texts_change ON incidents;

DROP TRIGGER IF EXISTS incident_texts_add ON incidents;

DROP FUNCTION IF EXISTS incident_texts_change();

DROP FUNCTION IF EXISTS incident_texts_add();

DROP TABLE IF EXISTS incident_texts;
