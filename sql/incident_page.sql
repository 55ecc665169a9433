-- read
--
-- One page of the list of incidents, newest first: its lines, and in position the time and the id
-- of its last incident, after which the next page begins, or nulls when the page is not full.
-- has_more is true when incidents follow.
--   $1 statuses           text[]       null for no filter, and then $2 must be null too
--   $2 sources            text[]       null for no filter, and then $1 must be null too
--   $3 since              timestamptz  created at this time or later, null for no bound
--   $4 before_created_at  timestamptz  before this place in the list, null for its beginning
--   $5 before_id          bigint       the id at that place
--   $6 size               integer      incidents at most
--   $7 format             text         json, ndjson or csv
-- The parameters decide which half of the union has rows, so one generic plan serves both. One row
-- more than asked for is read: it shows whether more incidents follow.
  WITH page AS (
       -- Without a filter: walk along the index of creation times.
       (SELECT created_at, id, incident_line(incident, $7) AS line
          FROM incidents_between($3, $4, $5) AS incident
         WHERE $1::text[] IS NULL
         ORDER BY created_at DESC, id DESC
         LIMIT $6::integer + 1)

        UNION ALL

       -- With a filter: read each status and source from its own part of another index, so that a
       -- rare one is found without a walk through the rest.
       (SELECT newest.created_at, newest.id, incident_line(newest.incident, $7)
          FROM unnest($1::text[]) AS wanted_status (status)
               CROSS JOIN unnest($2::text[]) AS wanted_source (source)
               CROSS JOIN LATERAL (
               SELECT created_at, id, incident
                 FROM incidents_of(wanted_status.status, wanted_source.source, $3, $4, $5)
                      AS incident
                ORDER BY status DESC, source DESC, created_at DESC, id DESC
                LIMIT $6 + 1) AS newest
         ORDER BY newest.created_at DESC, newest.id DESC
         LIMIT $6 + 1)),

       -- One half is empty and the other is in order, so array_agg() needs no ORDER BY.
       arrays AS (
       SELECT array_agg(id) AS ids, array_agg(created_at) AS creation_times,
              array_agg(line) AS lines
         FROM page)

SELECT join_lines(lines[:$6], $7) AS body,
       coalesce(cardinality(ids) > $6, false) AS has_more,
       ROW(creation_times[$6], ids[$6]) AS position
  FROM arrays;
