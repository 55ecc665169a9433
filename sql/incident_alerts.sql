-- read
--
-- The dedup_key that points to an incident, as an array of at most one: who sends it, how many
-- triggers it received for this incident, when the last one came, and what the newest one that
-- brought news said. body is null when there is no such incident.
--   $1 incident_id  bigint
SELECT (SELECT to_json(ARRAY(
               SELECT json_build_object(
                          'dedup_key', key,
                          'actor', actor,
                          'times', times,
                          'last_seen_at', rfc3339(last_seen_at),
                          'description', description,
                          'labels', labels,
                          'started_at', rfc3339(started_at),
                          'changed_at', rfc3339(changed_at))
                 FROM dedup_keys
                WHERE incident_id = $1))
          FROM incidents
         WHERE id = $1) AS body;
