-- Change an incident, with an entry on its timeline for each field that changes; what it already is
-- changes nothing. body is null when there is no such incident; nothing changes unless matched.
--   $1 incident_id  bigint
--   $2 description  text    null to keep it
--   $3 source       text    null to keep it
--   $4 status       text    null to keep it
--   $5 if_match     text    the header (RFC 9110, 13.1.1), null for none; weak tags never match
--   $6 actor        text
-- The row is locked first: only then are the values that the timeline gives as former ones the last,
-- and the clock, unlike now(), is past the change before this one.
  WITH before AS (
       SELECT id, description, source, status, version, incident_json(incidents) AS body,
              greatest(updated_at, clock_timestamp()) AS changed_at,
              coalesce($5, '*') = '*'
              OR format('"%s"', version) = ANY (regexp_split_to_array($5, '\s*,\s*')) AS matched
         FROM incidents
        WHERE id = $1
          FOR NO KEY UPDATE),
       changed AS (
       UPDATE incidents
          SET description = coalesce($2, before.description), source = coalesce($3, before.source),
              status = coalesce($4, before.status), version = before.version + 1, updated_at = changed_at
         FROM before
        WHERE incidents.id = before.id AND matched
          AND (coalesce($2, before.description), coalesce($3, before.source), coalesce($4, before.status))
              <> (before.description, before.source, before.status)
       RETURNING incidents.id, incidents.description, incidents.source, incidents.status,
                 incidents.version, incident_json(incidents) AS body),
       entries AS (
       INSERT INTO timeline (incident_id, kind, field, from_value, to_value, actor, created_at)
       SELECT changed.id, kind, field, was, becomes, $6, changed_at
         FROM before
              JOIN changed USING (id)
              CROSS JOIN LATERAL (
              VALUES ('edited', 'description', before.description, changed.description),
                     ('edited', 'source', before.source, changed.source),
                     ('status', NULL, before.status, changed.status)) AS fact (kind, field, was, becomes)
        WHERE was <> becomes)
SELECT coalesce(changed.body, before.body)::json AS body,
       format('"%s"', coalesce(changed.version, before.version)) AS etag, matched
  FROM (SELECT) AS once LEFT JOIN before ON true LEFT JOIN changed ON true;
