-- Report an incident, with the first entry of its timeline.
--   $1 description  text
--   $2 source       text
--   $3 actor        text
  WITH created AS (
       INSERT INTO incidents (description, source)
       VALUES ($1, $2)
       RETURNING id, version, incident_json(incidents) AS body),
       entry AS (
       INSERT INTO timeline (incident_id, kind, actor)
       SELECT id, 'created', $3
         FROM created)
SELECT id, version, body::json
  FROM created;
