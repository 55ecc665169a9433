-- write, batch
--
-- Apply events of monitoring tools. A trigger opens an incident; while the one that its key points to is unresolved, it
-- is only counted. An acknowledge moves that incident from open to in_progress, a resolve moves it from these two to
-- resolved. incident_id is the one that the actor's key points to, null for an unknown key.
--   $1 key          text[]   each once, even for two actors: Batcher keeps calls with the same key apart
--   $2 action       text[]   trigger, acknowledge or resolve
--   $3 actor        text[]
--   $4 description  text[]   of the incident that a trigger opens
--   $5 labels       jsonb[]  of that incident
-- If another process writes the same key, ON CONFLICT waits for it. The incident that it has opened cannot be seen here
-- and counts as unresolved; new_id is then not used. An incident that another transaction
-- holds is passed over (SKIP LOCKED): is_locked is true then, and the event does nothing.
  WITH input AS (
       SELECT key, action, actor, input.description, input.labels, position, incident_id AS old_id, status
         FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::jsonb[])
              WITH ORDINALITY AS input (key, action, actor, description, labels, position)
              LEFT JOIN dedup_keys USING (key, actor) LEFT JOIN incidents ON incidents.id = incident_id),
       triggers AS MATERIALIZED (
       SELECT input.*, CASE WHEN status IN ('open', 'in_progress') THEN old_id ELSE nextval('incidents_id_seq') END AS new_id
         FROM input WHERE action = 'trigger'),
       counted AS (
       INSERT INTO dedup_keys AS existing (key, actor, incident_id)
       SELECT key, actor, new_id FROM triggers ORDER BY position ON CONFLICT (key, actor) DO UPDATE
          SET (incident_id, times, last_seen_at) = (
              SELECT CASE WHEN is_finished THEN excluded.incident_id ELSE existing.incident_id END,
                     CASE WHEN is_finished THEN 1 ELSE existing.times + 1 END, clock_timestamp()
                FROM (SELECT EXISTS (SELECT FROM incidents WHERE id = existing.incident_id
                                        AND status IN ('resolved', 'closed')) AS is_finished) AS state)
       RETURNING key, incident_id),
       opened AS (
       INSERT INTO incidents (id, description, source, labels)
       SELECT incident_id, description, 'monitoring', labels
         FROM triggers JOIN counted USING (key) WHERE incident_id = new_id AND incident_id IS DISTINCT FROM old_id
       RETURNING id, created_at),
       locked AS (
       SELECT key, incident.*, CASE action WHEN 'resolve' THEN 'resolved' ELSE 'in_progress' END AS new_status, actor
         FROM input CROSS JOIN LATERAL (
              SELECT id, status, greatest(updated_at, noted_at, clock_timestamp()) AS changed_at FROM incidents
               WHERE action <> 'trigger' AND id = old_id AND (status = 'open' OR status = 'in_progress' AND action = 'resolve')
                 FOR NO KEY UPDATE SKIP LOCKED) AS incident),
       moved AS (
       UPDATE incidents SET status = new_status, version = version + 1, updated_at = changed_at
         FROM locked WHERE incidents.id = locked.id),
       entries AS (
       INSERT INTO timeline (incident_id, kind, from_value, to_value, actor, created_at)
       SELECT id, 'created', NULL, NULL, actor, opened.created_at FROM opened JOIN triggers ON id = new_id UNION ALL
       SELECT id, 'status', status, new_status, actor, changed_at FROM locked)
SELECT coalesce(counted.incident_id, old_id) AS incident_id,
       locked.id IS NULL AND (action = 'acknowledge' AND input.status = 'open'
                              OR action = 'resolve' AND input.status IN ('open', 'in_progress')) AS is_locked
  FROM input LEFT JOIN counted USING (key) LEFT JOIN locked USING (key)
 ORDER BY position;
