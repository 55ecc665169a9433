-- Contradictions between the tables, one row for each. Whatever happened to the service, there is none.
  WITH changes AS (
       SELECT incident_id, kind, field, from_value, to_value,
              lag(to_value) OVER changes_of_field AS value_before,
              row_number() OVER changes_of_field = 1 AS is_first,
              row_number() OVER (PARTITION BY incident_id, kind, field ORDER BY id DESC) = 1 AS is_last
         FROM timeline
        WHERE kind IN ('status', 'edited')
       WINDOW changes_of_field AS (PARTITION BY incident_id, kind, field ORDER BY id)),
       counts AS (
       SELECT incident_id, count(*) FILTER (WHERE kind = 'created') AS creations,
              count(DISTINCT created_at) FILTER (WHERE kind IN ('status', 'edited')) AS changes
         FROM timeline
        GROUP BY incident_id)
SELECT id, 'the timeline has not exactly one creation' AS contradiction
  FROM incidents LEFT JOIN counts ON incident_id = id
 WHERE creations IS DISTINCT FROM 1
UNION ALL
SELECT id, 'the version is not 1 plus the number of changes'
  FROM incidents LEFT JOIN counts ON incident_id = id
 WHERE version <> 1 + coalesce(changes, 0)
UNION ALL
SELECT id, 'the status is not the last one on the timeline'
  FROM incidents LEFT JOIN changes ON incident_id = id AND kind = 'status' AND is_last
 WHERE status <> coalesce(to_value, 'open')
UNION ALL
SELECT id, 'the description, the source or a label is not the last one on the timeline'
  FROM incidents JOIN changes ON incident_id = id AND kind = 'edited' AND is_last
 WHERE to_value IS DISTINCT FROM CASE field WHEN 'source' THEN source WHEN 'description' THEN description
                                            ELSE to_jsonb(incidents) #>> ARRAY['labels', substr(field, 8)] END
UNION ALL
SELECT incident_id, 'a change does not begin with the value that the change before it ended with'
  FROM changes
 WHERE CASE WHEN is_first THEN kind = 'status' AND from_value <> 'open'
            ELSE from_value IS DISTINCT FROM value_before END
UNION ALL
SELECT incident_id, 'a timeline has no incident'
  FROM counts LEFT JOIN incidents ON id = incident_id
 WHERE id IS NULL
UNION ALL
SELECT id, 'the copy of the description and the labels in incident_texts differs'
  FROM incidents FULL JOIN incident_texts AS texts USING (id)
 WHERE (search_form(incidents.description), incidents.labels, incidents.created_at)
       IS DISTINCT FROM (texts.description, texts.labels, texts.created_at)
UNION ALL
SELECT incident_id, 'an entry on the timeline is earlier than the one before it'
  FROM (SELECT incident_id, created_at < lag(created_at) OVER (PARTITION BY incident_id ORDER BY id) AS is_earlier
          FROM timeline) AS entries
 WHERE is_earlier
UNION ALL
SELECT id, 'the first times in progress and resolved are not those on the timeline'
  FROM incidents
       LEFT JOIN (
       SELECT incident_id, min(created_at) FILTER (WHERE to_value = 'in_progress') AS in_progress_at,
              min(created_at) FILTER (WHERE to_value = 'resolved') AS resolved_at
         FROM timeline
        WHERE kind = 'status'
        GROUP BY incident_id) AS first_times ON incident_id = id
 WHERE (incidents.in_progress_at, incidents.resolved_at)
       IS DISTINCT FROM (first_times.in_progress_at, first_times.resolved_at)
UNION ALL
SELECT made_id, 'an idempotency key names an incident or note that does not exist'
  FROM idempotency_keys
 WHERE NOT EXISTS (SELECT FROM incidents WHERE id = made_id)
   AND NOT EXISTS (SELECT FROM timeline WHERE id = made_id AND kind = 'note')
UNION ALL
SELECT incident_id, 'a dedup key names an incident that does not exist'
  FROM dedup_keys
 WHERE NOT EXISTS (SELECT FROM incidents WHERE id = incident_id)
 ORDER BY 1, 2;
