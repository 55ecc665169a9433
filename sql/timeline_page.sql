-- read
--
-- One page of the timeline, oldest first: its lines, and in position the id after which the next
-- page begins. When no entries follow, that is the greater of after and up_to. has_more is true
-- when entries follow, and incident_exists is false when there is no such incident. With up_to, a
-- standby refuses this (SQLSTATE 25006): it may lack some entries before that one.
--   $1 incident_id    bigint   only the entries of this incident, null for all
--   $2 kinds          text[]   only entries of these kinds, no duplicates
--   $3 after          bigint   only entries after this one
--   $4 up_to          bigint   only entries up to this one; required unless incident_id is given
--   $5 size           integer  entries at most
--   $6 format         text     json, ndjson or sse (Server-Sent Events)
--   $7 with_incident  boolean  whether each entry shows its incident, as it is now
-- The parameters decide which part of the union has rows; each walks along an index of its own.
  WITH page AS (
       -- The entries of one incident.
       (SELECT id, entry
          FROM timeline AS entry
         WHERE incident_id = $1 AND kind = ANY ($2::text[])
           AND id > $3 AND id <= coalesce($4, 9223372036854775807)
         ORDER BY id
         LIMIT $5::integer + 1)

        UNION ALL

       -- The entries of all incidents, if 'created' is among the kinds: they are read by their id.
       (SELECT id, entry
          FROM timeline AS entry
         WHERE $1 IS NULL AND 'created' = ANY ($2) AND kind = ANY ($2) AND id > $3 AND id <= $4
         ORDER BY id
         LIMIT $5 + 1)

        UNION ALL

       -- The same without 'created', kind by kind: the other kinds have an index. Only that index
       -- fits these comparisons of rows.
       (SELECT oldest.id, oldest.entry
          FROM unnest($2) AS wanted (kind)
               CROSS JOIN LATERAL (
               SELECT id, entry
                 FROM timeline AS entry
                WHERE $1 IS NULL AND 'created' <> ALL ($2)
                  AND kind <> 'created'
                  AND (kind, id) > (wanted.kind, $3) AND (kind, id) <= (wanted.kind, $4)
                ORDER BY kind, id
                LIMIT $5 + 1) AS oldest
         ORDER BY oldest.id
         LIMIT $5 + 1)),

       -- incident is null unless $7 is true.
       with_incidents AS (
       SELECT id, entry,
              ',"incident":' || (SELECT incident_json(incidents)
                                   FROM incidents
                                  WHERE $7 AND incidents.id = (entry).incident_id) AS incident
         FROM page),

       arrays AS (
       SELECT array_agg(id) AS ids, array_agg(timeline_line(entry, incident, $6)) AS lines
         FROM with_incidents)

SELECT join_lines(lines[:$5], $6) AS body,
       coalesce(cardinality(ids) > $5, false) AS has_more,
       CASE WHEN cardinality(ids) > $5 THEN ids[$5] ELSE greatest($3, $4) END AS position,
       $1 IS NULL OR EXISTS (SELECT FROM incidents WHERE id = $1) AS incident_exists
  FROM arrays
 WHERE $4 IS NULL OR require_primary();
