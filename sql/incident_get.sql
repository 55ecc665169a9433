-- Incidents and their entity tags; all null for one that there is not.
-- Parameters hold an element a call, and the rows come in their order.
-- unchanged: If-None-Match (RFC 9110, 13.1.2) has this tag, weak or not.
--   $1 incident_id    bigint[]
--   $2 if_none_match  text[]    the header, null for none
SELECT body::json, etag,
       etag IS NOT NULL AND if_none_match = '*'
       OR etag = ANY (regexp_split_to_array(replace(if_none_match, 'W/', ''), '\s*,\s*')) AS unchanged
  FROM unnest($1::bigint[], $2::text[]) WITH ORDINALITY AS call (id, if_none_match, place)
       LEFT JOIN LATERAL (
       SELECT incident_json(incidents) AS body, format('"%s"', version) AS etag
         FROM incidents
        WHERE incidents.id = call.id) AS incident ON true
 ORDER BY place;
