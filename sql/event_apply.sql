-- write, batch
--
-- Apply events of monitoring tools. A trigger opens an incident. While the one that its key points
-- to is unresolved, a trigger is counted instead, and where it differs from the trigger before
-- it, the incident is changed. An acknowledge moves the incident from open to in_progress, a
-- resolve moves it from either of them to resolved. An event that is older than the newest trigger
-- of its key does not change an unresolved incident; where the incident is resolved or closed, even
-- an older trigger opens a new one.
--
-- incident_id is the one that the key points to, null for an unknown key. When must_retry is true,
-- the event has done nothing and must be run again: another transaction holds its incident or its
-- key, or has just changed or added the key. The statement itself waits for a row in one case only:
-- another transaction is adding the same key.
--   $1 key          text[]         no key twice (Batcher compares keys only, not actors)
--   $2 action       text[]         trigger, acknowledge or resolve
--   $3 actor        text[]
--   $4 description  text[]         what a trigger says, for its incident
--   $5 labels       jsonb[]        likewise
--   $6 happened_at  timestamptz[]  by the sender's clock, null if not given
-- In the steps, names without a prefix are the event's values, last_ marks those stored with its
-- key, and old_ and new_ those of its incident.
  WITH -- The events, each with its key. SKIP LOCKED skips a key that another transaction holds: it
       -- has nulls here, and is_outdated is true for it below.
       with_keys AS MATERIALIZED (
       SELECT input.*, existing.*
         FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::jsonb[], $6::timestamptz[])
              WITH ORDINALITY
              AS input (key, action, actor, description, labels, happened_at, ordinal)
              LEFT JOIN LATERAL (
              SELECT incident_id, description AS last_description, labels AS last_labels,
                     started_at AS last_started_at, ROW(incident_id, changed_at) AS locked_key
                FROM dedup_keys
               WHERE dedup_keys.key = input.key AND dedup_keys.actor = input.actor
                 FOR NO KEY UPDATE SKIP LOCKED) AS existing ON true),

       -- seen is the key as this statement's snapshot has it; locked_key is its newest version.
       -- Both are null: there is no such key. Only locked_key is null: another transaction holds
       -- the key. They differ: another transaction has just changed the key, perhaps to an incident
       -- that this snapshot cannot see. In the last two cases, the key is outdated.
       compared AS MATERIALIZED (
       SELECT with_keys.*,
              (SELECT status FROM incidents WHERE id = with_keys.incident_id) AS status,
              (SELECT ROW(seen.incident_id, seen.changed_at)
                 FROM dedup_keys AS seen
                WHERE (seen.key, seen.actor) = (with_keys.key, with_keys.actor))
              IS DISTINCT FROM locked_key AS is_outdated,
              -- Links to the sender and images are ignored: they differ between the Alertmanagers
              -- of a cluster.
              (description, labels - ignored) = (last_description, last_labels - ignored)
              AS is_repeat
         FROM with_keys
              CROSS JOIN (
              VALUES (ARRAY['client_url', 'generatorURL', 'imageURL', 'image 1']))
              AS noise (ignored)),

       -- wait: run the event again; count: count the trigger; edit: count it and change description
       -- and labels; open: make an incident; move: change the status; ignore: do nothing.
       decided AS MATERIALIZED (
       SELECT compared.*,
              CASE WHEN is_outdated THEN 'wait'
                   WHEN action = 'trigger' AND status IN ('open', 'in_progress')
                   THEN CASE WHEN is_repeat OR happened_at < last_started_at THEN 'count'
                             ELSE 'edit' END
                   WHEN action = 'trigger' THEN 'open'
                   WHEN happened_at < last_started_at THEN 'ignore'
                   WHEN (status, action) IN (('open', 'acknowledge'), ('open', 'resolve'),
                                             ('in_progress', 'resolve')) THEN 'move'
                   ELSE 'ignore' END AS effect
         FROM compared),

       -- The incidents to change. SKIP LOCKED skips one that another transaction holds, and
       -- the status skips one that another transaction has just moved.
       locked AS MATERIALIZED (
       SELECT incident.*, ordinal, actor,
              CASE WHEN effect = 'edit' THEN status
                   WHEN action = 'resolve' THEN 'resolved'
                   ELSE 'in_progress' END AS new_status,
              CASE WHEN effect = 'edit' AND description <> last_description THEN description
                   ELSE old_description END AS new_description,
              CASE WHEN effect = 'edit' AND labels <> last_labels
                   THEN follow_sender(old_labels, last_labels, labels)
                   ELSE old_labels END AS new_labels
         FROM decided
              CROSS JOIN LATERAL (
              SELECT id, status AS old_status, description AS old_description, labels AS old_labels,
                     greatest(updated_at, noted_at, clock_timestamp()) AS new_updated_at
                FROM incidents
               WHERE id = decided.incident_id AND incidents.status = decided.status
                     AND effect IN ('edit', 'move')
                 FOR NO KEY UPDATE SKIP LOCKED) AS incident),

       -- What is done now. An event whose incident could not be locked is missing, and waits.
       ready AS MATERIALIZED (
       SELECT decided.*,
              CASE effect WHEN 'open' THEN nextval('incidents_id_seq') ELSE incident_id END AS id
         FROM decided
        WHERE effect IN ('open', 'count') OR ordinal IN (SELECT ordinal FROM locked)),

       -- ON CONFLICT: another transaction has just added the same key. All add keys in the same
       -- order, so that two transactions cannot wait for each other.
       added_keys AS (
       INSERT INTO dedup_keys (key, actor, incident_id, description, labels, started_at, changed_at)
       SELECT key, actor, id, description, labels, happened_at, clock_timestamp()
         FROM ready
        WHERE incident_id IS NULL
        ORDER BY key, actor
       ON CONFLICT DO NOTHING
       RETURNING incident_id AS new_id),

       -- A trigger that is only counted changes no text: it repeats the last one, or is older.
       changed_keys AS (
       UPDATE dedup_keys AS existing
          SET incident_id = ready.id,
              times = CASE effect WHEN 'open' THEN 1 WHEN 'move' THEN times ELSE times + 1 END,
              last_seen_at = CASE effect WHEN 'move' THEN last_seen_at ELSE clock_timestamp() END,
              description = CASE WHEN effect IN ('open', 'edit') THEN ready.description
                                 ELSE existing.description END,
              labels = CASE WHEN effect IN ('open', 'edit') THEN ready.labels
                            ELSE existing.labels END,
              -- A new incident begins with its own trigger, even after one with a later time. A
              -- trigger that tells no time leaves the time as it was.
              started_at = CASE effect WHEN 'open' THEN coalesce(happened_at, existing.started_at)
                                       WHEN 'move' THEN existing.started_at
                                       ELSE greatest(happened_at, existing.started_at) END,
              changed_at = CASE effect WHEN 'count' THEN existing.changed_at
                                       ELSE clock_timestamp() END
         FROM ready
        WHERE (existing.key, existing.actor) = (ready.key, ready.actor)),

       opened AS (
       INSERT INTO incidents (id, description, source, labels)
       SELECT id, description, 'monitoring', labels
         FROM ready
        WHERE effect = 'open'
              AND (incident_id IS NOT NULL OR id IN (SELECT new_id FROM added_keys))
       RETURNING id, created_at),

       changed AS (
       UPDATE incidents
          SET status = new_status,
              description = new_description,
              labels = new_labels,
              version = version + 1,
              updated_at = new_updated_at
         FROM locked
        WHERE incidents.id = locked.id
              AND (old_status, old_description, old_labels)
                  <> (new_status, new_description, new_labels)),

       entries AS (
       INSERT INTO timeline (incident_id, kind, field, from_value, to_value, actor, created_at)
       SELECT id, 'created', NULL, NULL, NULL, actor, created_at
         FROM opened
              JOIN ready USING (id)
        UNION ALL
       SELECT id, kind, field, from_value, to_value, actor, new_updated_at
         FROM locked
              CROSS JOIN LATERAL (
              VALUES ('status', NULL, old_status, new_status),
                     ('edited', 'description', old_description, new_description)
               UNION ALL
              SELECT 'edited', label.field, label.from_value, label.to_value
                FROM changed_labels(old_labels, new_labels) AS label)
              AS entry (kind, field, from_value, to_value)
        WHERE from_value IS DISTINCT FROM to_value)

-- An event must be run again when it should do something and is not among the ready ones, or when
-- another transaction has added its key first, so that it has opened nothing.
SELECT coalesce(opened.id, decided.incident_id) AS incident_id,
       decided.effect <> 'ignore'
       AND (ready.id IS NULL OR decided.effect = 'open' AND opened.id IS NULL) AS must_retry
  FROM decided
       LEFT JOIN ready USING (ordinal)
       LEFT JOIN opened ON opened.id = ready.id
 ORDER BY ordinal;
