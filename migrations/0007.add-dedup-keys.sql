-- depends: 0006.add-labels
--
-- The keys by which monitoring tools name a problem, for event_apply.sql: which incident the key points to, how
-- often the key has come for it, and when last. Each actor has keys of its own, because tools number their
-- problems from 1 on. All this is not in the incident, whose version would change with each repetition.
CREATE TABLE IF NOT EXISTS dedup_keys (
    key          text NOT NULL CONSTRAINT dedup_keys_key_check CHECK (char_length(key) BETWEEN 1 AND 255),
    actor        text NOT NULL,
    -- If somebody deletes an incident by hand, its key opens a new one.
    incident_id  bigint NOT NULL REFERENCES incidents ON DELETE CASCADE,
    times        integer NOT NULL DEFAULT 1,
    last_seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (key, actor)
);

-- incident_alerts.sql: the keys that point to an incident.
CREATE INDEX IF NOT EXISTS dedup_keys_incident_id_idx ON dedup_keys (incident_id);
