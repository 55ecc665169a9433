-- kind: read, single
--
-- Everything that happened to an incident, oldest first. body is null when there is no such incident,
-- because every incident has at least the entry of its creation.
--   $1 incident_id  bigint
SELECT json_agg(timeline_json(timeline) ORDER BY id) AS body
  FROM timeline
 WHERE incident_id = $1;
