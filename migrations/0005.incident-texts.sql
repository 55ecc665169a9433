-- depends: 0004.idempotency-keys
-- The texts to search, in a table of their own: an update of an incident writes to every index of its
-- table, and 30 trigrams were more than half the cost of moving it to another status.
CREATE TABLE IF NOT EXISTS incident_texts (
    id          bigint PRIMARY KEY,
    description text NOT NULL
);

-- No incident may come, or change its text, between the copy and the triggers that keep it.
LOCK TABLE incidents IN SHARE ROW EXCLUSIVE MODE;

INSERT INTO incident_texts (id, description)
SELECT id, description
  FROM incidents
    ON CONFLICT (id) DO UPDATE SET description = excluded.description;

-- Parts of words in any case and alphabet, from three characters on (incident_search.sql). New rows
-- wait in a pending list that every search reads through: it is kept short, 256 KiB or 32 pages.
CREATE INDEX IF NOT EXISTS incident_texts_description_idx
    ON incident_texts USING gin (description gin_trgm_ops) WITH (gin_pending_list_limit = 256);

DROP INDEX IF EXISTS incidents_description_idx;

CREATE OR REPLACE FUNCTION incident_texts_add() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO incident_texts (id, description)
    SELECT id, description
      FROM added
        ON CONFLICT (id) DO UPDATE SET description = excluded.description;
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION incident_texts_change() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    UPDATE incident_texts
       SET description = NEW.description
     WHERE id = NEW.id;
    RETURN NULL;
END
$$;

-- One call for all incidents of a batch, and none for an update that leaves the text alone.
CREATE OR REPLACE TRIGGER incident_texts_add
    AFTER INSERT ON incidents REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION incident_texts_add();

CREATE OR REPLACE TRIGGER incident_texts_change
    AFTER UPDATE ON incidents
    FOR EACH ROW WHEN (NEW.description <> OLD.description) EXECUTE FUNCTION incident_texts_change();
