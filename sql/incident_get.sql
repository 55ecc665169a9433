-- read, batch
--
-- Incidents with their etags; both are null when there is no such incident. is_unchanged tells
-- whether If-None-Match has this etag (RFC 9110, 13.1.2: weak tags match too).
--   $1 incident_id    bigint[]
--   $2 if_none_match  text[]    the header, null for none
SELECT body::json, etag,
       etag IS NOT NULL AND if_none_match = '*'
       OR etag = ANY (regexp_split_to_array(replace(if_none_match, 'W/', ''), '\s*,\s*'))
       AS is_unchanged
  FROM unnest($1::bigint[], $2::text[])
       WITH ORDINALITY AS input (id, if_none_match, ordinal)
       LEFT JOIN LATERAL (
       SELECT incident_json(incidents) AS body, format('"%s"', version) AS etag
         FROM incidents
        WHERE incidents.id = input.id) AS incident ON true
 ORDER BY ordinal;
