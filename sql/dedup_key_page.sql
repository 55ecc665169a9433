-- read
--
-- One page of the incidents to which a dedup_key points, one for each actor that uses the key. They are few, so
-- the other filters need no index. For the parameters up to the 8th, see incident_page.sql; for the next three,
-- incident_search.sql.
--   $1 statuses           text[]
--   $2 sources            text[]
--   $3 since              timestamptz
--   $4 before_created_at  timestamptz
--   $5 before_id          bigint
--   $6 size               integer
--   $7 format             text
--   $8 separator          text
--   $9 pattern            text
--   $10 has_accents       boolean
--   $11 label_filter      jsonpath
--   $12 dedup_key         text         of any actor
  WITH page AS (
       SELECT created_at, id, incident_line(incident, $7) AS line
         FROM dedup_keys
              JOIN incidents_between($3, $4, $5) AS incident ON incident.id = incident_id
        WHERE key = $12 AND incident_matches(incident, $1, $2, $9, $10, $11)
        ORDER BY created_at DESC, id DESC
        LIMIT $6::integer + 1),
       arrays AS (
       SELECT array_agg(id) AS ids, array_agg(created_at) AS times, array_agg(line) AS lines
         FROM page)
SELECT convert_to(coalesce(array_to_string(lines[:$6], $8), ''), 'UTF8') AS body,
       coalesce(cardinality(ids) > $6, false) AS has_more, ROW(times[$6], ids[$6]) AS position
  FROM arrays;
