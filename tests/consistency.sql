-- What the tables say against each other, a row for each fault: none, whatever happened to the service.
  WITH changes AS (
       SELECT incident_id, kind, field, from_value, to_value,
              lag(to_value) OVER facts AS value_before,
              row_number() OVER (PARTITION BY incident_id, kind, field ORDER BY id DESC) = 1 AS is_last
         FROM timeline
        WHERE kind IN ('status', 'edited')
       WINDOW facts AS (PARTITION BY incident_id, kind, field ORDER BY id)),
       counts AS (
       SELECT incident_id, count(*) FILTER (WHERE kind = 'created') AS creations,
              count(DISTINCT created_at) FILTER (WHERE kind IN ('status', 'edited')) AS changes
         FROM timeline
        GROUP BY incident_id)
SELECT id, 'it was not created once' AS fault
  FROM incidents LEFT JOIN counts ON incident_id = id
 WHERE creations IS DISTINCT FROM 1
UNION ALL
SELECT id, 'its version does not count its changes'
  FROM incidents LEFT JOIN counts ON incident_id = id
 WHERE version <> 1 + coalesce(changes, 0)
UNION ALL
SELECT id, 'its status is not the last of its timeline'
  FROM incidents LEFT JOIN changes ON incident_id = id AND kind = 'status' AND is_last
 WHERE status <> coalesce(to_value, 'open')
UNION ALL
SELECT id, 'its text or source is not the last of its timeline'
  FROM incidents JOIN changes ON incident_id = id AND kind = 'edited' AND is_last
 WHERE to_value <> CASE field WHEN 'source' THEN source ELSE description END
UNION ALL
SELECT incident_id, 'a change does not begin where the one before it ended'
  FROM changes
 WHERE from_value <> coalesce(value_before, CASE kind WHEN 'status' THEN 'open' ELSE from_value END)
UNION ALL
SELECT incident_id, 'a timeline has no incident'
  FROM counts LEFT JOIN incidents ON id = incident_id
 WHERE id IS NULL
UNION ALL
SELECT id, 'its text is sought as another'
  FROM incidents FULL JOIN incident_texts USING (id)
 WHERE incidents.description IS DISTINCT FROM incident_texts.description
UNION ALL
SELECT made_id, 'a key has made nothing'
  FROM idempotency_keys
 WHERE NOT EXISTS (SELECT FROM incidents WHERE id = made_id)
   AND NOT EXISTS (SELECT FROM timeline WHERE id = made_id AND kind = 'note')
 ORDER BY 1, 2;
