-- depends: 0003.take-over-replaced-incidents
-- What each key said last, for event_apply.sql, which changes an incident only where a sender says
-- something else than before. The columns are null until a key has spoken for the first time since
-- this migration.
SET lock_timeout = '3s';
ALTER TABLE dedup_keys
    -- What its newest trigger said.
    ADD COLUMN IF NOT EXISTS description text,
    ADD COLUMN IF NOT EXISTS labels jsonb,
    -- Since when the problem is there, by the sender's clock; null for a sender that tells no time.
    ADD COLUMN IF NOT EXISTS started_at timestamptz,
    -- When the key last opened, changed or moved its incident.
    ADD COLUMN IF NOT EXISTS changed_at timestamptz;

-- The labels of an incident after a sender, who said `said` before, says `says`. A label that the
-- sender says as before stays as the incident has it. One that the sender no longer says goes,
-- unless a person has changed it since. When there are over 32, new labels are left out.
CREATE OR REPLACE FUNCTION follow_sender(labels jsonb, said jsonb, says jsonb) RETURNS jsonb
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT coalesce(jsonb_object_agg(name, value), '{}')
      FROM (SELECT name, value
              FROM jsonb_object_keys(labels || says) AS name
                   CROSS JOIN LATERAL (
                   SELECT CASE WHEN says -> name IS NOT DISTINCT FROM said -> name
                               THEN labels ->> name
                               ELSE coalesce(says ->> name, nullif(labels ->> name, said ->> name))
                          END AS value) AS new
             WHERE value IS NOT NULL
             ORDER BY labels ? name DESC, name
             LIMIT 32) AS followed
$$;
