-- Move an incident to another status; body is null when there is no such incident.
-- The status that it has already changes nothing, and leaves no entry on the timeline.
--   $1 incident_id  bigint
--   $2 status       text
--   $3 actor        text
  WITH before AS (
       SELECT id, status, incident_json(incidents) AS body
         FROM incidents
        WHERE id = $1
          FOR NO KEY UPDATE),
       changed AS (
       UPDATE incidents
          SET status = $2, version = version + 1, updated_at = now()
         FROM before
        WHERE incidents.id = before.id AND before.status <> $2
       RETURNING incidents.id, before.status AS from_status, incident_json(incidents) AS body),
       entry AS (
       INSERT INTO timeline (incident_id, kind, from_value, to_value, actor)
       SELECT id, 'status', from_status, $2, $3
         FROM changed)
SELECT coalesce((SELECT body FROM changed), (SELECT body FROM before))::json AS body;
